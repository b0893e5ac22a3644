"""Options that several commands take alike, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from latentcache import InputError

if TYPE_CHECKING:
    from pipeline.engines import EngineOptions


Gpus = Annotated[
    int | None, typer.Option(min=0, help="GPUs to use; 0 computes on the CPU; by default all of this machine.")
]
Workers = Annotated[int, typer.Option(min=1, help="Without GPUs: series in work at once on CPUs.")]
GpuShare = Annotated[
    float, typer.Option(min=0.05, max=1, help="On Ray, a worker's share of a GPU; 0.5 puts two on each.")
]
Engine = Annotated[str, typer.Option(help="dask (embedded, the default), ray, or inline.")]
DaskScheduler = Annotated[str | None, typer.Option(help="A dask scheduler, e.g. tcp://host:8786.")]
RayAddress = Annotated[str | None, typer.Option(help="A Ray cluster's address, or `auto`.")]
Threads = Annotated[int, typer.Option(min=1, help="Arithmetic threads per device; pinned, for equal bytes.")]
Prefetch = Annotated[int, typer.Option(min=0, help="Series read ahead of each device.")]
SeriesTimeout = Annotated[float | None, typer.Option(min=1, help="On Ray, seconds after which a series is excluded.")]


def engine_options(
    engine: str,
    gpus: int | None,
    *,
    workers: int = 1,
    gpu_share: float = 1.0,
    dask_scheduler: str | None = None,
    ray_address: str | None = None,
    prefetch: int = 1,
    series_timeout: float | None = None,
) -> EngineOptions:
    """Return the engine options that the user asked for.

    Raises:
        InputError: An unknown engine, or an option that this engine does not have.
    """
    from pipeline.engines import EngineOptions, resolve_gpus

    gpus = resolve_gpus(gpus)
    if gpu_share < 1 and engine != "ray":
        raise InputError("--gpu-share without Ray", expected="--engine ray", remedy="Give --engine ray, or no share.")
    if ray_address is not None and engine != "ray":
        raise InputError("--ray-address without Ray", expected="--engine ray", remedy="Give --engine ray too.")
    if dask_scheduler is not None and engine != "dask":
        raise InputError("--dask-scheduler without dask", expected="--engine dask", remedy="Give --engine dask too.")
    return EngineOptions(
        name=engine,  # type: ignore[arg-type]
        # Workers that share a GPU have one name: with a share of 0.5 on two GPUs cuda:0, cuda:0, cuda:1, cuda:1.
        devices=tuple(f"cuda:{min(int(i * gpu_share), gpus - 1)}" for i in range(round(gpus / gpu_share)))
        or ("cpu",) * workers,
        gpus_per_worker=gpu_share,
        prefetch=prefetch,
        scheduler=dask_scheduler,
        ray_address=ray_address,
        timeout_s=series_timeout,
    )


Store = Annotated[str, typer.Argument(help="The store; a path or s3://bucket/prefix.")]
Private = Annotated[str | None, typer.Option(help="Where the private part is, if not STORE/private.")]


def _resolved(context: typer.Context, device: str) -> str:
    """The device that a command works with, for every command alike."""
    from pipeline.engines import resolve_device

    return device if context.resilient_parsing else resolve_device(device)


Device = Annotated[str, typer.Option(callback=_resolved, help="auto (a GPU where there is one), cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Arithmetic of the VAE: auto (as its latents were encoded), fp32 or bf16."),
]
MemoryGib = Annotated[float | None, typer.Option(help="Memory budget of the VAE on each device, GiB.")]


Sampler = Annotated[str | None, typer.Option(help="Sampler; by default the objective's own.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Sampling steps; by default the objective's own.")]
Samples = Annotated[int, typer.Option(min=1, help="Samples whose mean is the output.")]
Answer = Annotated[
    str,
    typer.Option(help="Of several samples: their mean, for viewing; one sample, for measuring density; or both."),
]
Seed = Annotated[int, typer.Option(help="Seed of the sampling noise.")]


Detail = Annotated[str, typer.Option(help="absolute or residual: how decoded slices become HU.")]
Consistency = Annotated[bool, typer.Option(help="Project onto the measured thick slices.")]
RefinerChoice = Annotated[
    Path | None,
    typer.Option(help="A run of `ctpipe train-refiner`; by default the checkpoint's own, where it won. Or `none`."),
]


Uncertainty = Annotated[
    bool, typer.Option("--uncertainty", help="Also write the standard deviation over samples, in HU.")
]
UncertaintyMap = Annotated[
    bool, typer.Option("--uncertainty-map", help="The same as a Parametric Map instead of a second CT series.")
]
AlarmMap = Annotated[
    bool,
    typer.Option("--alarm-map", help="Also write where the sample differs from the others, as a Parametric Map."),
]
Texture = Annotated[
    bool | None,
    typer.Option(
        "--texture/--no-texture",
        help="Give a draw the fine detail and noise that true thin slices have; by default where --answer is a sample.",
    ),
]
TransferSyntax = Annotated[str, typer.Option(help="explicit, jpegls or htj2k; all lossless.")]
Enhanced = Annotated[
    bool, typer.Option("--enhanced", help="Write one Enhanced CT instance instead of one CT instance a slice.")
]
