"""``ctpipe encode``: run the frozen VAE once per series into the latent store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import (
    DaskScheduler,
    Engine,
    Gpus,
    GpuShare,
    MemoryGib,
    Prefetch,
    Private,
    RayAddress,
    SeriesTimeout,
    Threads,
    Workers,
    engine_options,
)
from cli.output import AsJson, Exit, counting_bar, emit
from cli.summaries import encode_text


def register(app: typer.Typer) -> None:
    app.command("encode")(encode)


def encode(
    store: Annotated[str, typer.Argument(help="The store that `ctpipe ingest` filled; a path or s3://bucket/prefix.")],
    vae: Annotated[str, typer.Option(help="`tiny`, or the path of MAISI weights (.pt or .safetensors).")] = "tiny",
    window: Annotated[str, typer.Option(help="soft-tissue, maisi, lung, or C:W in HU.")] = "soft-tissue",
    gpus: Gpus = None,
    workers: Workers = 1,
    gpu_share: GpuShare = 1.0,
    engine: Engine = "dask",
    dask_scheduler: DaskScheduler = None,
    ray_address: RayAddress = None,
    roles: Annotated[str, typer.Option(help="Latents wanted, by comma.")] = "thin,thick,thick_on_thin",
    refiner: Annotated[
        Path | None,
        typer.Option(help="A refiner's run, or a shipped model: encode its slices too, as role refined_on_thin."),
    ] = None,
    augment: Annotated[
        str, typer.Option(help="flip-x, flip-y or both by comma: encode the training pairs mirrored too.")
    ] = "",
    pad_in_plane: Annotated[int, typer.Option(help="Pad rows and columns to a multiple; 64 for latent patch 2.")] = 32,
    tiling: Annotated[
        str, typer.Option(help="exact, or sliding: the blended windows that others use, to compare with.")
    ] = "exact",
    memory_gib: MemoryGib = None,
    dtype: Annotated[
        str, typer.Option(help="Arithmetic: auto (bf16 on a GPU, fp32 on a CPU), fp32 or bf16. Part of the encode key.")
    ] = "auto",
    threads: Threads = 2,
    prefetch: Prefetch = 1,
    series_timeout: SeriesTimeout = None,
    round_trip: Annotated[
        float, typer.Option(min=0, max=1, help="Share of latents whose reconstruction is measured.")
    ] = 0.02,
    private: Private = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Make latents of archives that have changed since anew.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read all latents first, and make those anew that are damaged or gone.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be encoded, and stop.")] = False,
    as_json: AsJson = False,
) -> int:
    """Encode every series and pair that the store lacks. Run it again to resume.

    Latents of archives that have changed since stay until --refresh replaces them, since that changes what the next run
    trains on; until then they are counted, no run trains on them, and the exit code is 3. Runs that are pinned to an
    older snapshot keep the latents that they began with.

    The VAE of a mirrored volume is not the mirrored latent of the volume, so mirrored pairs are encoded, each under
    another key; `ctpipe train --set data.augment=flip-x` draws among them.

    With --repair, latents whose bytes are damaged or gone are made anew from their archives. One whose archive is not
    at hand stays as it is and is named; so is a run that is pinned to a damaged latent which did not come back as it
    was. The exit code is 3 then.

    Examples:

        ctpipe encode STORE --vae tiny

        ctpipe encode STORE --repair

        ctpipe encode STORE --gpus 2 --vae weights/autoencoder_epoch273.pt --window soft-tissue

        ctpipe encode STORE --refiner REFINER_RUN

        ctpipe encode STORE --refiner default

        ctpipe encode STORE --augment flip-x

        ctpipe encode STORE --tiling sliding && ctpipe diff STORE EXACT_KEY SLIDING_KEY

        ctpipe encode s3://archive/store --private /secure/private --engine ray --ray-address auto --gpus 8
    """
    from pipeline.workflows import EncodeJob, encode as run

    options = engine_options(
        engine, gpus, workers=workers, gpu_share=gpu_share, dask_scheduler=dask_scheduler, ray_address=ray_address,
        prefetch=prefetch, series_timeout=series_timeout,
    )  # fmt: skip
    job = EncodeJob(
        store, options, vae, window, roles, refiner, pad_in_plane, tiling, memory_gib, dtype, threads, round_trip,
        private, refresh=refresh, repair=repair, dry_run=dry_run, augment=augment,
    )  # fmt: skip
    with counting_bar("encoding") as show:
        summary = run(job, show)
    emit(vars(summary), encode_text(summary, job), as_json)
    unsettled = (summary.failed, summary.unpaired_by_pixels, summary.stale, summary.hopeless, summary.pinned)
    return Exit.QUARANTINED if any(unsettled) else Exit.OK
