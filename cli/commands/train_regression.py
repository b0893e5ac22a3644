"""``ctpipe train-regression``: the compact network that a diffusion model must be compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Device, Private
from cli.output import AsJson, Exit, emit, progress_wanted, training_bar


def register(app: typer.Typer) -> None:
    app.command("train-regression")(train_regression)


def train_regression(
    store: Annotated[str, typer.Argument(help="The store that the model was trained on.")],
    run: Annotated[Path, typer.Argument(help="Folder for the network; give it to `ctpipe evaluate --regression`.")],
    like: Annotated[Path | None, typer.Option(help="A diffusion run: its snapshot, window and training time.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="Training time, where no run is given.")] = None,
    cpu_seconds: Annotated[
        float | None, typer.Option(min=1, help="The same in processor time of this process, for a loaded machine.")
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
    from cli.commands.train_refiner import parse_patch
    from pipeline.workflows import RegressionJob, train_regression as run_job

    job = RegressionJob(
        store, run, like, seconds, cpu_seconds, width, blocks, parse_patch(patch), learning_rate, seed, device, private
    )
    with training_bar(progress_wanted()) as show:
        result = run_job(job, show)
    text = (
        f"{result['parameters']} parameters, {result['steps']} steps in {result['seconds']:.0f} s on "
        f"{result['pairs']} training pairs; compare with: ctpipe evaluate STORE RUN --regression {run}"
    )
    emit(result, text, as_json)
    return Exit.OK
