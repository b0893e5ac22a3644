"""Commands that train networks in pixel space: ``train-refiner`` and ``train-regression``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import Device, Private
from cli.output import AsJson, Exit, emit, progress_bars, progress_wanted, training_bar, training_steps


def register(app: typer.Typer) -> None:
    app.command("train-refiner")(train_refiner)
    app.command("train-regression")(train_regression)


def train_refiner(
    store: Annotated[str, typer.Argument(help="An encoded store whose pairs it learns from.")],
    run: Annotated[Path, typer.Argument(help="Folder for the run; give it to --refiner afterwards.")],
    checkpoint: Annotated[
        Path | None, typer.Option(help="The diffusion run whose output it will correct; else plain interpolation.")
    ] = None,
    vae: Annotated[str, typer.Option(help="The VAE that encoded the store: `tiny` or a path.")] = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 4000,
    patch: Annotated[str, typer.Option(help="Voxels of a patch, D,H,W.")] = "20,64,64",
    batch: Annotated[int, typer.Option(min=1, help="Patches a step.")] = 4,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network, on 2x2 pixels folded into one.")] = 48,
    blocks: Annotated[int, typer.Option(min=0, help="Residual blocks; each widens its view by 2 thick slices.")] = 6,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    sampling_steps: Annotated[int | None, typer.Option(min=1, help="Of the diffusion run's sampler.")] = None,
    seed: Annotated[int, typer.Option(help="Of patches, operators and sampling.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in RUN.")] = False,
    device: Device = "auto",
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Train the refiner on patches streamed from the archives that the store was made of.

    Half of the patches see the measured thick slices, half see thick slices simulated from the thin ones by other
    slice profiles, phases and overlaps. The validation split is scored with a profile that training never draws. Where
    the output of --checkpoint wins by it there, over a linear estimate too, the refiner becomes that run's own: decode,
    interpolate and evaluate use it unless another is named.

    Examples:

        ctpipe train-refiner STORE RUN --steps 4000

        ctpipe train-refiner STORE RUN --checkpoint MODEL_RUN --device cuda --width 64 --blocks 8
    """
    from pipeline.workflows import RefinerJob, train_refiner as run_job

    job = RefinerJob(
        store, run, checkpoint, vae, steps, parse_patch(patch), batch, width, blocks, learning_rate, sampling_steps,
        seed, resume, device, private,
    )  # fmt: skip
    with progress_bars() as show:
        result = run_job(job, show, training_steps(show))
    emit(result, _text(result, run), as_json)
    return Exit.OK


def parse_patch(text: str) -> tuple[int, int, int]:
    """``D,H,W`` voxels."""
    from latentcache import InputError

    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"patch {text!r}", expected="D,H,W in voxels", remedy="For example --patch 20,64,64.")
    depth, height, wide = (int(part) for part in parts)
    return depth, height, wide


def _text(result: dict[str, Any], run: Path) -> str:
    text = f"{result['steps']} steps on {result['pairs']} pairs, loss {result['loss']:.5f}; use it with --refiner {run}"
    if result["default_of_checkpoint"]:
        text += "\nit wins on held-out pairs: decode, interpolate and evaluate with that checkpoint now use it"
    if result["validation"]:
        text += "\nheld-out pairs and operator: " + ", ".join(
            f"{name.removesuffix('_psnr_db')} {value:.2f} dB"
            for name, value in sorted(result["validation"].items())
            if name.endswith("_psnr_db")
        )
    return text


def train_regression(
    store: Annotated[str, typer.Argument(help="The store that the model was trained on.")],
    run: Annotated[Path, typer.Argument(help="Folder for the network; give it to `ctpipe evaluate --regression`.")],
    like: Annotated[Path | None, typer.Option(help="A diffusion run: its snapshot, window and training time.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Training time, where no run is given.")] = None,
    cpu_seconds: Annotated[
        float | None, typer.Option(min=1, help="The same in processor time of this process, for a loaded machine.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps instead of a time: the same on any machine.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Channels of the network, on 2x2 pixels folded into one.")] = 48,
    blocks: Annotated[int, typer.Option(min=0, help="Residual blocks; each widens its view by 2 thick slices.")] = 6,
    patch: Annotated[str, typer.Option(help="Voxels of a patch, D,H,W.")] = "20,64,64",
    learning_rate: Annotated[float, typer.Option(help="Learning rate, constant after a warm-up.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of weights and patches.")] = 0,
    device: Device = "auto",
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Train a small residual network from interpolated thick to thin slices, on the same split and for as long.

    It is the network of `ctpipe train-refiner` on plain interpolation; no latents take part. It predicts the mean of
    what is possible, which PSNR rewards: a generative model has to come near it.

    Examples:

        ctpipe train-regression STORE REGRESSION_RUN --like RUN

        ctpipe evaluate STORE RUN --regression REGRESSION_RUN
    """
    from pipeline.workflows import RegressionJob, train_regression as run_job

    job = RegressionJob(
        store, run, like, seconds, cpu_seconds, steps, width, blocks, parse_patch(patch), learning_rate, seed, device,
        private,
    )  # fmt: skip
    with training_bar(progress_wanted()) as show:
        result = run_job(job, show)
    text = (
        f"{result['parameters']} parameters, {result['steps']} steps in {result['seconds']:.0f} s on "
        f"{result['pairs']} training pairs; compare with: ctpipe evaluate STORE RUN --regression {run}"
    )
    emit(result, text, as_json)
    return Exit.OK
