"""``ctpipe train-vae``: fine-tune the VAE on the user's own volumes and window, or train the tiny one anew."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Device, Dtype, Private
from cli.output import AsJson, Exit, emit, progress_wanted, training_bar


def register(app: typer.Typer) -> None:
    app.command("train-vae")(train_vae)


def train_vae(
    out: Annotated[Path, typer.Argument(help="The weights to write (.safetensors); give them to --vae afterwards.")],
    store: Annotated[str | None, typer.Option(help="Train on this store's training split; else on phantoms.")] = None,
    preset: Annotated[
        str, typer.Option(help="decoder (fine-tune it), all (both parts), or tiny (from scratch).")
    ] = "tiny",
    vae: Annotated[Path | None, typer.Option(help="Weights to start from; needed for decoder.")] = None,
    window: Annotated[str, typer.Option(help="soft-tissue, maisi, lung, or C:W in HU.")] = "soft-tissue",
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps; the preset's if not given.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    crop: Annotated[str | None, typer.Option(help="Voxels of a crop, D,H,W; multiples of 4.")] = None,
    perceptual_weight: Annotated[float, typer.Option(min=0, help="Weight of VGG19's distance; needs --vgg.")] = 0.0,
    vgg: Annotated[Path | None, typer.Option(help="State dict of torchvision's vgg19.")] = None,
    discriminator_weight: Annotated[float, typer.Option(min=0, help="Weight of a patch discriminator.")] = 0.0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of crops and noise.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUT's folder .run.")] = False,
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Train the decoder alone, or the whole VAE, under one window. Interrupted, it goes on with --resume.

    Cached latents stay valid under a tuned decoder: decode, evaluate, train and interpolate take its file by --vae.
    Checkpoints and the log are in a folder beside OUT with the suffix .run; OUT has the best of the validation split.

    Examples:

        ctpipe train-vae tiny.safetensors --preset tiny --steps 500

        ctpipe train-vae soft.safetensors --store STORE --preset decoder --vae autoencoder_epoch273.pt --device cuda
    """
    from latentcache import InputError
    from pipeline.vae import PRESETS
    from pipeline.workflows import VaeTrainingJob, run_vae_training

    if preset not in PRESETS:
        raise InputError(f"preset {preset!r}", expected=", ".join(PRESETS), remedy="For example --preset decoder.")
    changes: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "crop_zyx": parse_crop(crop)}
    config = replace(
        PRESETS[preset],
        **{name: value for name, value in changes.items() if value is not None},
        perceptual_weight=perceptual_weight,
        discriminator_weight=discriminator_weight,
        seed=seed,
        precision=dtype,
    )
    job = VaeTrainingJob(out, config, vae, store, window, vgg, device, private, resume)
    with training_bar(progress_wanted()) as show:
        done = run_vae_training(job, show)
    summary, weights = done.summary, done.weights
    result: dict[str, Any] = {**asdict(summary), "run": str(job.run), "out": str(out) if weights else None}
    text = f"{summary.steps} steps (stopped by: {summary.stopped_by}), loss {summary.loss:.4f}"
    if weights is None:
        text += "; run the same command with --resume"
    else:
        result |= {"sha256": weights.file_sha256, "architecture": weights.architecture.to_dict()}
        result["encoder_sha256"] = weights.sha256
        text += f"\nwrote {out}, sha256 {weights.file_sha256}; validation {summary.best_metric or 0:.2f} dB"
    emit(result, text, as_json)
    return Exit.OK


def parse_crop(text: str | None) -> tuple[int, ...] | None:
    """``D,H,W`` voxels; None for none."""
    from latentcache import InputError

    if text is None:
        return None
    try:
        depth, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"crop {text!r}", expected="D,H,W", remedy="For example --crop 16,128,128.") from None
    return depth, height, width
