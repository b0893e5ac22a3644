"""``ctpipe train``: a diffusion model on the cached latents."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Private
from cli.output import AsJson, Exit, emit, progress_wanted, stderr, training_bar
from cli.summaries import train_text

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
    resume_if_there: Annotated[
        bool, typer.Option("--resume-if-there", help="Continue the run in RUN, or begin it: for jobs that restart.")
    ] = False,
    vae: Annotated[
        str | None, typer.Option(help="The VAE of the store (`tiny` or a path), for image losses and validation.")
    ] = None,
    refiner: Annotated[
        Path | None,
        typer.Option(help="Start from this refiner's (or model's) slices, encoded by `ctpipe encode --refiner`."),
    ] = None,
    private: Private = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be trained and what it needs.")] = False,
    as_json: AsJson = False,
) -> int:
    """Train a thick-to-thin model. Interrupted (Ctrl-C, SIGTERM, kill), it goes on with --resume.

    Examples:

        ctpipe train STORE RUN --preset tiny

        ctpipe train STORE RUN --gpus 4 --vae weights/autoencoder_epoch273.pt --set optimiser.epochs=200

        ctpipe train STORE RUN --refiner REFINER_RUN

        ctpipe train STORE RUN --config classic.yaml --resume
    """
    from diffusion.training import become_torchrun, check_gpus, is_first, is_worker, train_on_ray
    from pipeline.workflows import configuration, describe, run_training

    overrides = list(set_ or [])
    if latent_patch is not None:
        overrides.append(f"model.latent_patch={latent_patch}")
    if max_steps is not None:
        overrides.append(f"budget.max_steps={max_steps}")
    if refiner is not None:
        overrides.append("data.start=refined")
    settings: dict[str, Any] = {
        "refiner": str(refiner.resolve() if refiner.exists() else refiner) if refiner else None,
        "store": store,
        "run": str(run.resolve()),
        "preset": preset,
        "config": str(config) if config else None,
        "overrides": overrides,
        "resume": "if-there" if resume_if_there and not resume else resume,
        "vae": vae,
        "private": private,
        "gpus": gpus,
    }
    if dry_run:
        plan = describe(settings, note)
        emit(plan, "\n".join(f"{name.replace('_', ' ')}: {value}" for name, value in plan.items()), as_json)
        return Exit.OK
    if ray_address is not None:
        figures = train_on_ray(run_training, settings, gpus or 1, use_gpu=gpus != 0, address=ray_address)
    else:
        if gpus and gpus > 1 and not is_worker():
            check_gpus(gpus)
            become_torchrun(gpus, rerun_command(), configuration(settings).parallel.shutdown_timeout_s)
        with training_bar(progress_wanted() and is_first()) as show:
            figures = run_training(settings, show, note)
    if figures.get("rank", 0) == 0:
        emit(figures, train_text(figures, run), as_json)
    return Exit.OK


def rerun_command() -> list[str]:
    """This very command, for every rank."""
    import sys

    return list(sys.argv)


def note(text: str) -> None:
    """Show a remark on the configuration."""
    stderr.print(f"note: {text}", markup=False)
