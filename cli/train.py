"""``ctpipe train``: a diffusion model on the cached latents."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Private
from cli.output import AsJson, Exit, emit, progress_wanted, stderr

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusion.config import TrainConfig
    from diffusion.model import Interpolator
    from diffusion.progress import Progress
    from latentcache.store import LatentStore

log = logging.getLogger("ctpipe.train")


def register(app: typer.Typer) -> None:
    app.command("train")(train)


def train(
    store: Annotated[str, typer.Argument(help="The store that `ctpipe encode` filled; a path or s3://bucket/prefix.")],
    run: Annotated[Path, typer.Argument(help="Folder for the run: checkpoints, log.jsonl, TensorBoard.")],
    preset: Annotated[str | None, typer.Option(help="tiny (CPU, minutes), medium (599M) or classic.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file, ours or the classic form.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, e.g. data.window=16; repeatable.")] = None,
    latent_patch: Annotated[int | None, typer.Option(help="2 folds 2x2 in-plane latents into channels.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after this step of the run.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs; 0 is the CPU; one, where there is one.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="Train on a Ray cluster: its address, or `auto`.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in RUN.")] = False,
    vae: Annotated[
        str | None, typer.Option(help="The VAE of the store (`tiny` or a path), for image losses and validation.")
    ] = None,
    private: Private = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and what it needs.")] = False,
    as_json: AsJson = False,
) -> int:
    """Train a thick-to-thin model. Interrupted (Ctrl-C, SIGTERM, kill), it goes on with --resume.

    Examples:

        ctpipe train STORE RUN --preset tiny

        ctpipe train STORE RUN --gpus 4 --vae weights/autoencoder_epoch273.pt --set optimiser.epochs=200

        ctpipe train STORE RUN --config classic.yaml --resume
    """
    from diffusion.launch import become_torchrun, check_gpus, is_worker, train_on_ray

    overrides = list(set_ or [])
    if latent_patch is not None:
        overrides.append(f"model.latent_patch={latent_patch}")
    if max_steps is not None:
        overrides.append(f"budget.max_steps={max_steps}")
    settings: dict[str, Any] = {
        "store": store,
        "run": str(run.resolve()),
        "preset": preset,
        "config": str(config) if config else None,
        "overrides": overrides,
        "resume": resume,
        "vae": vae,
        "private": private,
        "gpus": gpus,
        "progress": progress_wanted(),
    }
    if dry_run:
        plan = describe(settings)
        emit(plan, "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in plan.items()), as_json)
        return Exit.OK
    if ray_address is not None:
        figures = train_on_ray(run_training, settings, gpus or 1, use_gpu=gpus != 0, address=ray_address)
    else:
        if gpus and gpus > 1 and not is_worker():
            check_gpus(gpus)
            become_torchrun(gpus, rerun_command())
        figures = run_training(settings)
    if figures.get("rank", 0) == 0:
        emit(figures, summary_text(figures, run), as_json)
    return Exit.OK


def rerun_command() -> list[str]:
    """This very command, for every rank."""
    import sys

    return list(sys.argv)


def run_training(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, which may be one of several. Picklable, so that Ray can send it."""
    from diffusion.launch import check_gpus
    from diffusion.train import train as train_model
    from diffusion.world import join, leave
    from latentcache.store import LatentStore

    if settings["gpus"] == 0:
        import os

        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    check_gpus(settings["gpus"] or 0)
    config = configuration(settings)
    world = join()
    latents = LatentStore.open(settings["store"])
    decoder, validate = image_side(settings, config, latents, str(world.device), first=world.rank == 0)
    try:
        with progress_line(settings["progress"] and world.rank == 0) as show:
            summary = train_model(
                latents,
                settings["run"],
                config,
                decoder=decoder,
                validate=validate,
                resume=settings["resume"],
                on_progress=show,
            )
    finally:
        leave()
    return {**asdict(summary), "run": settings["run"], "rank": world.rank}


def configuration(settings: dict[str, Any]) -> TrainConfig:
    """The run's configuration: on resume the run's own, with this call's overrides on top; else preset and file."""
    import json

    from diffusion.config import from_dict, load_config

    kept = Path(settings["run"]) / "config.json"
    if settings["resume"] and kept.exists() and settings["preset"] is None and settings["config"] is None:
        base = from_dict(json.loads(kept.read_text()))
        config, notes = load_config(base.preset, None, settings["overrides"], base=base)
    else:
        config, notes = load_config(settings["preset"], settings["config"], settings["overrides"])
    for note in notes:
        stderr.print(f"note: {note}", markup=False)
    return config


def image_side(
    settings: dict[str, Any], config: TrainConfig, latents: LatentStore, device: str, *, first: bool
) -> tuple[Callable[[Any], Any] | None, Callable[[Interpolator, int], dict[str, float]] | None]:
    """What needs the VAE: the image losses' decoder, and validation that samples and decodes held-out pairs."""
    losses = config.losses.ms_ssim_weight > 0 or config.losses.perceptual_weight > 0
    looks = config.validation.every_epochs > 0 and (
        config.validation.images_every > 0 or config.validation.metric != "val_loss"
    )
    if not losses and not (looks and first):
        return None, None
    from diffusion.pairs import choose_encode_key
    from latentcache.errors import InputError
    from pipeline.private import PrivateStore
    from pipeline.vae import load_vae
    from pipeline.validation import HeldOutImages, check_same_vae

    encode_key = choose_encode_key(latents, config.data.encode_key)
    tiny = load_vae("tiny", device)
    wanted = latents.encoding(encode_key).vae_sha256
    if settings["vae"] is None and tiny.sha256 != wanted:
        raise InputError(
            "no VAE for the image losses and the image validation",
            expected=f"the one that encoded this store's latents (SHA-256 begins {wanted[:12]})",
            remedy="Name it with --vae PATH; or train without: --set losses.ms_ssim_weight=0 "
            "--set losses.perceptual_weight=0 --set validation.images_every=0.",
        )
    model = tiny if settings["vae"] in (None, "tiny") else load_vae(settings["vae"], device)
    check_same_vae(model, wanted)
    decoder = model.decode_slab if losses else None
    if not looks or not first:
        return decoder, None
    held_out = HeldOutImages(
        latents,
        PrivateStore.open(settings["store"], settings["private"]),
        model,
        encode_key,
        count=config.validation.pairs,
    )

    def validate(interpolator: Interpolator, step: int) -> dict[str, float]:
        from diffusion.sample import condition_of

        return held_out.figures(
            lambda pair: interpolator.generate(
                condition_of(latents, interpolator, pair)[0],
                sampler=config.validation.sampler,
                num_inference_steps=config.validation.sampling_steps,
            )
        )

    return decoder, validate


def describe(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run would be and need, without training it."""
    from diffusion.estimate import estimate_step, memory_present
    from diffusion.train import open_streams
    from diffusion.world import World, default_device
    from latentcache.store import LatentStore

    config = configuration(settings)
    latents = LatentStore.open(settings["store"])
    workers = max(1, settings["gpus"] or 1)
    world = World(0, workers, default_device())
    stream, held_out = open_streams(latents, config, world)
    need = estimate_step(config, stream.shapes[0], world)
    total = config.optimiser.steps or config.optimiser.epochs * len(stream)
    return {
        "preset": config.preset,
        "objective": config.objective.name,
        "training_pairs": len(stream.pairs),
        "validation_pairs": len(held_out.pairs) if held_out else 0,
        "left_out": stream.left_out,
        "largest_sample": list(stream.shapes[0]),
        "samples_per_epoch": stream.samples_per_epoch,
        "steps_per_epoch": len(stream),
        "steps": min(total, config.budget.max_steps or total),
        "parameters": need.parameters,
        "tflop_per_epoch": round(3 * need.forward_flops_per_sample * stream.samples_per_epoch / 1e12, 3),
        "memory_needed_gib": round(need.peak_bytes / 2**30, 2),
        "memory_present_gib": round(memory_present(world.device) / 2**30, 2),
        "checkpoint_gib": round(need.checkpoint_bytes / 2**30, 2),
        "device": world.device.type,
        "snapshot": latents.snapshot,
        "encode_key": stream.encode_key,
    }


@contextmanager
def progress_line(wanted: bool) -> Iterator[Callable[[Progress], None]]:
    """A progress bar with the figures that tell whether the run is well."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    figures = TextColumn("{task.description}")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), figures)
    with Bar(*columns, console=stderr, disable=not wanted) as bar:
        task = bar.add_task("", total=None)

        def show(now: Progress) -> None:
            mfu = "" if now.mfu is None else f" mfu {now.mfu:.0%}"
            text = (
                f"loss {now.loss:.4f} {now.samples_per_s:.1f} samples/s data wait {now.data_wait_fraction:.1%}"
                f" {now.memory_gib:.1f} GiB{mfu}"
            )
            bar.update(task, total=now.total_steps, completed=now.step, description=text)

        yield show


def summary_text(figures: dict[str, Any], run: Path) -> str:
    """What people read at the end."""
    lines = [
        f"{figures['steps']} steps in {figures['seconds']:.0f} s (stopped by: {figures['stopped_by']}), "
        f"loss {figures['loss']:.4f}, data wait {figures['data_wait_fraction']:.1%}",
    ]
    if figures["validation"]:
        lines.append("validation: " + ", ".join(f"{k} {v:.4f}" for k, v in sorted(figures["validation"].items())))
    lines.append(f"checkpoints in {run}/checkpoints; continue with --resume")
    return "\n".join(lines)
