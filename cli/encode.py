"""``ctpipe encode``: run the frozen VAE once per series into the latent store."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.output import AsJson, Exit, emit, progress_wanted, stderr


def register(app: typer.Typer) -> None:
    app.command("encode")(encode)


def encode(
    store: Annotated[str, typer.Argument(help="The store that `ctpipe ingest` filled; a path or s3://bucket/prefix.")],
    vae: Annotated[str, typer.Option(help="`tiny`, or the path of MAISI weights (.pt or .safetensors).")] = "tiny",
    window: Annotated[str, typer.Option(help="soft-tissue, maisi, lung, or C:W in HU.")] = "soft-tissue",
    gpus: Annotated[int, typer.Option(min=0, help="GPUs to use; 0 encodes on the CPU.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Without GPUs: series encoded at once on CPUs.")] = 1,
    gpu_share: Annotated[
        float, typer.Option(min=0.05, max=1, help="On Ray, a worker's share of a GPU; 0.5 puts two on each.")
    ] = 1.0,
    engine: Annotated[str, typer.Option(help="dask (embedded, the default), ray, or inline.")] = "dask",
    dask_scheduler: Annotated[str | None, typer.Option(help="A dask scheduler, e.g. tcp://host:8786.")] = None,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster's address, or `auto`.")] = None,
    roles: Annotated[str, typer.Option(help="Latents wanted, by comma.")] = "thin,thick,thick_on_thin",
    pad_in_plane: Annotated[int, typer.Option(help="Pad rows and columns to a multiple; 64 for latent patch 2.")] = 32,
    memory_gib: Annotated[float | None, typer.Option(help="Memory budget of the VAE on each device.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Arithmetic threads a device; pinned, for equal bytes.")] = 2,
    prefetch: Annotated[int, typer.Option(min=0, help="Series read ahead of each device.")] = 1,
    series_timeout: Annotated[
        float | None, typer.Option(min=1, help="On Ray, seconds after which a series is set aside.")
    ] = None,
    round_trip: Annotated[
        float, typer.Option(min=0, max=1, help="Share of latents whose round trip is measured.")
    ] = 0.02,
    private: Annotated[str | None, typer.Option(help="Where the private part is, if not STORE/private.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be encoded, and stop.")] = False,
    as_json: AsJson = False,
) -> int:
    """Encode every series and pair that the store lacks. Run it again to resume.

    Examples:

        ctpipe encode STORE --vae tiny

        ctpipe encode STORE --gpus 2 --vae weights/autoencoder_epoch273.pt --window soft-tissue

        ctpipe encode s3://archive/store --private /secure/private --engine ray --ray-address auto --gpus 8
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from latentcache.errors import InputError
    from pipeline.encode_store import EncodeSettings, encode_store, parse_roles
    from pipeline.engine import EngineOptions
    from pipeline.hu import Window

    settings = EncodeSettings(
        vae=vae,
        window=Window.parse(window),
        roles=parse_roles(roles),
        round_trip_fraction=round_trip,
        memory_gib=memory_gib,
        pad_in_plane=pad_in_plane,
        torch_threads=threads,
    )
    options = EngineOptions(
        name=engine,  # type: ignore[arg-type]
        devices=tuple(f"cuda:{i}" for i in range(round(gpus / gpu_share))) or ("cpu",) * workers,
        gpus_per_worker=gpu_share,
        prefetch=prefetch,
        scheduler=dask_scheduler,
        ray_address=ray_address,
        timeout_s=series_timeout,
    )
    if gpu_share < 1 and engine != "ray":
        raise InputError("--gpu-share without Ray", expected="--engine ray", remedy="Give --engine ray, or no share.")
    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not progress_wanted()) as progress:
        bar = progress.add_task("encode", total=None)

        def advance(outcome: Any, planned: int) -> None:
            progress.update(bar, total=planned, advance=1)

        summary = encode_store(store, settings, options, private_url=private, dry_run=dry_run, on_outcome=advance)
    verb = "would encode" if dry_run else "encoded"
    lines = [
        f"{verb} {summary.planned} studies or series "
        f"({summary.committed} latents committed, {summary.already} already there)",
        f"encode key {summary.encode_key}, snapshot {summary.snapshot}",
    ]
    lines += [f"set aside {name}: {reason}" for name, reason in sorted(summary.failed.items())]
    lines += [f"pair refused {name}: {reason}" for name, reason in sorted(summary.unpaired_by_pixels.items())]
    emit(vars(summary), "\n".join(lines), as_json)
    return Exit.QUARANTINED if summary.failed or summary.unpaired_by_pixels else Exit.OK
