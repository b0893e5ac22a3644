"""``ctpipe evaluate``: a run's output on held-out pairs, beside every baseline and the VAE's ceiling."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.options import (
    Consistency,
    DaskScheduler,
    Detail,
    Device,
    Dtype,
    MemoryGib,
    Private,
    RayAddress,
    RefinerChoice,
    Sampler,
    Samples,
    Seed,
    SeriesTimeout,
    Steps,
    Threads,
    engine_options,
)
from cli.output import AsJson, Exit, emit, progress_bars


def register(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate)


def evaluate(
    store: Annotated[str, typer.Argument(help="The store that the run was trained on, or one encoded alike.")],
    run: Annotated[Path | None, typer.Argument(help="A training run's folder; `rplhr` works without one.")] = None,
    protocol: Annotated[
        str, typer.Option(help="window (a store's pairs), or rplhr (STORE is the folder of the RPLHR-CT download).")
    ] = "window",
    out: Annotated[Path | None, typer.Option(help="Results of rplhr without a run; ./rplhr by default.")] = None,
    split: Annotated[
        str, typer.Option(help="train, val or test. Every evaluation of test is logged in the run.")
    ] = "test",
    vae: Annotated[str, typer.Option(help="The VAE that the store was encoded with: `tiny` or a path.")] = "tiny",
    sampler: Sampler = None,
    steps: Steps = None,
    samples: Samples = 1,
    seed: Seed = 0,
    detail: Detail = "residual",
    consistency: Consistency = True,
    refiner: RefinerChoice = None,
    device: Device = "auto",
    memory_gib: MemoryGib = None,
    dtype: Dtype = "auto",
    private: Private = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate this many pairs at most.")] = None,
    engine: Annotated[
        str, typer.Option(help="inline (one pair after the other, the default), dask or ray.")
    ] = "inline",
    workers: Annotated[int, typer.Option(min=1, help="Pairs scored at once; with --device cuda, GPUs.")] = 1,
    dask_scheduler: DaskScheduler = None,
    ray_address: RayAddress = None,
    threads: Threads = 2,
    series_timeout: SeriesTimeout = None,
    texture: Annotated[
        bool, typer.Option("--texture", help="Score a draw with the texture of true thin slices, as decode writes one.")
    ] = False,
    regression: Annotated[
        Path | None, typer.Option(help="A run of `ctpipe train-regression`, to be compared in the same table.")
    ] = None,
    vgg19: Annotated[
        Path | None, typer.Option(help="State dict of torchvision's vgg19, for the perceptual distance.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Score a run on a split. Resumes: a case that is done is not done again.

    Examples:

        ctpipe evaluate STORE RUN --split test

        ctpipe evaluate STORE RUN --split val --samples 8 --json

        ctpipe evaluate STORE RUN --regression REGRESSION_RUN --vgg19 vgg19.pth

        ctpipe evaluate STORE RUN --engine ray --ray-address auto --workers 16

        ctpipe evaluate RPLHR-CT RUN --protocol rplhr --split test
    """
    from latentcache import InputError
    from pipeline.evaluation import summary_text
    from pipeline.workflows import EvaluationJob, RplhrJob, evaluate_rplhr, evaluate_run

    common: dict[str, Any] = {
        "split": split, "vae": vae, "sampler": sampler, "steps": steps, "samples": samples, "seed": seed,
        "detail": detail, "consistency": consistency, "device": device, "memory_gib": memory_gib, "limit": limit,
        "precision": dtype,
        "regression": regression, "refiner": refiner, "texture": texture,
    }  # fmt: skip
    if protocol != "rplhr" and (protocol != "window" or run is None):
        raise InputError(
            f"--protocol {protocol}" + ("" if run else " without a run"),
            expected="window with STORE and RUN, or rplhr with the data set's folder",
            remedy="Give a training run's folder, or --protocol rplhr.",
        )
    with progress_bars() as show:
        if protocol == "rplhr" or run is None:
            document, folder = evaluate_rplhr(RplhrJob(Path(store), run, out=out, **common), show)
        else:
            spread = engine_options(
                engine, workers if device.startswith("cuda") else 0, workers=workers, dask_scheduler=dask_scheduler,
                ray_address=ray_address, series_timeout=series_timeout,
            )  # fmt: skip
            job = EvaluationJob(store, run, private=private, vgg19=vgg19, engine=spread, threads=threads, **common)
            document, folder = evaluate_run(job, show)
    emit(document, summary_text(document, folder), as_json)
    return Exit.QUARANTINED if document["failures"] else Exit.OK
