"""``ctpipe encode``: run the frozen VAE once per series into the latent store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from cli.output import AsJson, Exit, emit, progress_wanted, stderr


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
        Path | None, typer.Option(help="A refiner's run: encode its slices too, as role refined_on_thin.")
    ] = None,
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
        float, typer.Option(min=0, max=1, help="Share of latents whose round trip is measured.")
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

    With --repair, latents whose bytes are damaged or gone are made anew from their archives. One whose archive is not
    at hand stays as it is and is named; so is a run that is pinned to a damaged latent which did not come back as it
    was. The exit code is 3 then.

    Examples:

        ctpipe encode STORE --vae tiny

        ctpipe encode STORE --repair

        ctpipe encode STORE --gpus 2 --vae weights/autoencoder_epoch273.pt --window soft-tissue

        ctpipe encode STORE --refiner REFINER_RUN

        ctpipe encode STORE --tiling sliding && ctpipe diff STORE EXACT_KEY SLIDING_KEY

        ctpipe encode s3://archive/store --private /secure/private --engine ray --ray-address auto --gpus 8
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from pipeline.encode import EncodeSettings, encode_store, parse_roles
    from pipeline.refiner import RefinerFile
    from pipeline.vae import parse_tiling
    from pipeline.volume import Window

    wanted = parse_roles(roles)
    file = None if refiner is None else RefinerFile.of(refiner.absolute())
    if file is not None and "refined_on_thin" not in wanted:
        wanted = (*wanted, "refined_on_thin")
    settings = EncodeSettings(
        vae=vae,
        window=Window.parse(window),
        roles=wanted,
        refiner=file,
        round_trip_fraction=round_trip,
        memory_gib=memory_gib,
        pad_in_plane=pad_in_plane,
        tiling=parse_tiling(tiling),
        torch_threads=threads,
        precision=dtype,
    )
    options = engine_options(
        engine,
        gpus,
        workers=workers,
        gpu_share=gpu_share,
        dask_scheduler=dask_scheduler,
        ray_address=ray_address,
        prefetch=prefetch,
        series_timeout=series_timeout,
    )
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not progress_wanted()) as progress:
        bar = progress.add_task("encode", total=None)

        def advance(outcome: Any, planned: int) -> None:
            progress.update(bar, total=planned, advance=1)

        summary = encode_store(
            store,
            settings,
            options,
            private_url=private,
            dry_run=dry_run,
            refresh=refresh,
            repair=repair,
            on_outcome=advance,
        )
    verb = "would encode" if dry_run else "encoded"
    lines = [
        f"{verb} {summary.planned} studies or series "
        f"({summary.committed} latents committed, {summary.already} already there)",
        f"encode key {summary.encode_key}, snapshot {summary.snapshot}",
    ]
    if summary.retired:
        lines.append(f"{summary.retired} latents of archives that had changed were retired")
    if summary.stale:
        verb = "would be retired and made anew" if refresh else "give --refresh to make them anew"
        lines.append(f"{summary.stale} latents are of archives that have changed since, or of another refiner: {verb}")
    if repair:
        verb = "to be made anew" if dry_run else "retired to be made anew"
        again = f"{summary.restored} came back byte for byte, in older snapshots too"
        lines.append(
            f"{summary.damaged} latents are damaged or gone, {summary.damaged - len(summary.hopeless)} {verb}"
            + ("" if dry_run else f"; {again}")
        )
    lines += [f"cannot be repaired {name}: {reason}" for name, reason in sorted(summary.hopeless.items())]
    lines += [
        f"run {name} is pinned to a snapshot with {count} of them: begin it anew or restore them from a copy"
        for name, count in sorted(summary.pinned.items())
    ]
    lines += [f"set aside {name}: {reason}" for name, reason in sorted(summary.failed.items())]
    lines += [f"pair refused {name}: {reason}" for name, reason in sorted(summary.unpaired_by_pixels.items())]
    emit(vars(summary), "\n".join(lines), as_json)
    unsettled = (summary.failed, summary.unpaired_by_pixels, summary.stale, summary.hopeless, summary.pinned)
    return Exit.QUARANTINED if any(unsettled) else Exit.OK
