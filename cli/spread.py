"""Options of every command that spreads its series over devices, declared once, and the engine's options from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from latentcache.errors import InputError

if TYPE_CHECKING:
    from pipeline.engine import EngineOptions

Gpus = Annotated[int, typer.Option(min=0, help="GPUs to use; 0 computes on the CPU.")]
Workers = Annotated[int, typer.Option(min=1, help="Without GPUs: series in work at once on CPUs.")]
GpuShare = Annotated[
    float, typer.Option(min=0.05, max=1, help="On Ray, a worker's share of a GPU; 0.5 puts two on each.")
]
Engine = Annotated[str, typer.Option(help="dask (embedded, the default), ray, or inline.")]
DaskScheduler = Annotated[str | None, typer.Option(help="A dask scheduler, e.g. tcp://host:8786.")]
RayAddress = Annotated[str | None, typer.Option(help="A Ray cluster's address, or `auto`.")]
Threads = Annotated[int, typer.Option(min=1, help="Arithmetic threads a device; pinned, for equal bytes.")]
Prefetch = Annotated[int, typer.Option(min=0, help="Series read ahead of each device.")]
SeriesTimeout = Annotated[float | None, typer.Option(min=1, help="On Ray, seconds after which a series is set aside.")]


def engine_options(
    engine: str,
    gpus: int,
    *,
    workers: int = 1,
    gpu_share: float = 1.0,
    dask_scheduler: str | None = None,
    ray_address: str | None = None,
    prefetch: int = 1,
    series_timeout: float | None = None,
) -> EngineOptions:
    """How to spread work, as the user asked for it.

    Raises:
        InputError: An unknown engine, or an option that this engine does not have.
    """
    from pipeline.engine import EngineOptions

    if gpu_share < 1 and engine != "ray":
        raise InputError("--gpu-share without Ray", expected="--engine ray", remedy="Give --engine ray, or no share.")
    if ray_address is not None and engine != "ray":
        raise InputError("--ray-address without Ray", expected="--engine ray", remedy="Give --engine ray too.")
    if dask_scheduler is not None and engine != "dask":
        raise InputError("--dask-scheduler without dask", expected="--engine dask", remedy="Give --engine dask too.")
    return EngineOptions(
        name=engine,  # type: ignore[arg-type]
        devices=tuple(f"cuda:{i}" for i in range(round(gpus / gpu_share))) or ("cpu",) * workers,
        gpus_per_worker=gpu_share,
        prefetch=prefetch,
        scheduler=dask_scheduler,
        ray_address=ray_address,
        timeout_s=series_timeout,
    )
