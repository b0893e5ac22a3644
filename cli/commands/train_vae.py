"""``ctpipe train-vae``: fine-tune the VAE on the user's own volumes and window, or train the tiny one anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Device, Private
from cli.output import AsJson, Exit, emit, progress_wanted, stderr

if TYPE_CHECKING:
    from pipeline.vae import Perceptual
    from pipeline.volume import Window


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
    seed: Annotated[int, typer.Option(help="Of crops and noise.")] = 0,
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Train the decoder alone (cached latents stay valid as data), or the whole VAE, under one window.

    Examples:

        ctpipe train-vae tiny.safetensors --preset tiny --steps 500

        ctpipe train-vae soft.safetensors --store STORE --preset decoder --vae autoencoder_epoch273.pt --device cuda
    """
    from rich.progress import Progress

    from latentcache import InputError
    from pipeline.vae import PRESETS, random_crops, train_vae as train
    from pipeline.volume import Window

    if preset not in PRESETS:
        raise InputError(f"preset {preset!r}", expected=", ".join(PRESETS), remedy="For example --preset decoder.")
    changes: dict[str, Any] = {"steps": steps, "learning_rate": learning_rate, "crop_zyx": _crop(crop)}
    config = replace(
        PRESETS[preset],
        **{name: value for name, value in changes.items() if value is not None},
        perceptual_weight=perceptual_weight,
        discriminator_weight=discriminator_weight,
        seed=seed,
    )
    shown = Window.parse(window)
    volumes = _phantoms(shown, seed) if store is None else _series(store, private, shown, seed)
    last: dict[str, float] = {}
    with Progress(console=stderr, disable=not progress_wanted()) as progress:
        bar = progress.add_task("training", total=config.steps)

        def on_step(step: int, terms: dict[str, float]) -> None:
            last.update(terms, step=step)
            progress.advance(bar)

        weights = train(
            config,
            random_crops(volumes, config.crop_zyx, seed),
            out,
            start=vae,
            device=device,
            perceptual=_perceptual(vgg, device) if perceptual_weight > 0 else None,
            on_step=on_step,
        )
    result = {"out": str(out), "sha256": weights.sha256, "architecture": weights.architecture.to_dict(), "last": last}
    emit(result, f"wrote {out}, sha256 {weights.sha256}; last loss {last['loss']:.4f}, L1 {last['l1']:.4f}", as_json)
    return Exit.OK


def _crop(text: str | None) -> tuple[int, ...] | None:
    from latentcache import InputError

    if text is None:
        return None
    try:
        depth, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"crop {text!r}", expected="D,H,W", remedy="For example --crop 16,128,128.") from None
    return depth, height, width


def _perceptual(vgg: Path | None, device: str) -> Perceptual:
    from diffusion.losses import load_vgg19, perceptual_distance

    network = load_vgg19(vgg, device)
    return lambda ours, theirs: perceptual_distance(network, ours[:, 0], theirs[:, 0]).mean()


def _phantoms(window: Window, seed: int) -> Iterator[Any]:
    """Endless thin and thick series of made patients that no user's seed makes, in [-1, 1]."""
    from pipeline.phantom import make_patient

    number = 2_000_000 + 100_000 * seed
    while True:
        number += 1
        patient = make_patient(number, 96, 48, "APE" if number % 2 else "non-APE")
        yield window.to_unit(patient.thin.hu)
        yield window.to_unit(patient.thick.hu)


def _series(store: str, private: str | None, window: Window, seed: int) -> Iterator[Any]:
    """The training split's series again and again in random order, in [-1, 1]."""
    import random

    from latentcache import InputError, LatentStore
    from pipeline.identity import PrivateStore
    from pipeline.reading import read_series

    pointers = PrivateStore.open(store, private)
    keys = [s.series_key for s in LatentStore.open(store).series() if s.status == "ok" and s.split == "train"]
    if not keys:
        raise InputError("no usable series in the training split", expected="one at least", remedy="Ingest more.")
    order = random.Random(seed)
    while True:
        for key in order.sample(keys, len(keys)):
            yield window.to_unit(read_series(pointers.pointer(key)).hu)
