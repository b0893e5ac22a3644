"""``ctpipe plan``: time and storage of a job before it is started."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    series: Annotated[float, typer.Option(help="Series to encode, e.g. 1e6.")],
    gpus: Annotated[int, typer.Option(min=0, help="GPUs in all; 0 encodes on CPU cores.")] = 0,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores in all; 6 beside each GPU by default.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Without GPUs: series encoded at once; one a core by default.")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option("--from", "--store", help="Take rates from the timings of this store's encode: more of its kind."),
    ] = None,
    rate: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE replaces a rate, e.g. encode_gpu_s=2.1; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Predict how long encoding takes, what it stores, and which resource binds.

    Examples:

        ctpipe plan --series 1e6 --gpus 8

        ctpipe plan --series 20000 --gpus 2 --from STORE --rate network_mb_s=120
    """
    from latentcache import InputError, LatentStore
    from pipeline.engines import SOURCES, Rates, cost, measured, override

    rates, sources = Rates(), dict(SOURCES)
    if store is not None:
        rates, told = measured(LatentStore.open(store).table("timings"), rates)
        sources |= dict.fromkeys(told, "measured: this store's timings")
        sources["source_mb"] = f"scaled by this store's voxels; {SOURCES['source_mb']}"
    given = dict(item.split("=", 1) for item in rate or () if "=" in item)
    if len(given) != len(rate or ()):
        raise InputError(
            "a --rate without a value", expected="NAME=VALUE once a name", remedy="See ctpipe plan --help."
        )
    rates = override(rates, given)
    sources |= dict.fromkeys(given, "given")
    found = cost(series, gpus, rates, cores, workers)
    lines = [
        f"{series:,.0f} series on {gpus} GPUs: {_time(found.hours)}; {found.binds} binds",
        f"reads {found.archive_tb:,.2f} TB, stores {found.store_tb:,.2f} TB of latents, "
        f"{found.gpu_hours:,.0f} GPU hours",
        "series a second that each could do, and the share of it left idle:",
    ]
    for name, speed in sorted(found.series_per_s.items(), key=lambda pair: pair[1]):
        lines.append(f"  {name:32} {speed:12,.3f}  {found.idle[name]:4.0%}")
    lines.append("rates, to be replaced with --rate NAME=VALUE:")
    lines += [f"  {name:20} {value:10,.4g}  {sources[name]}" for name, value in asdict(rates).items()]
    emit({**asdict(found), "rates": asdict(rates), "sources": sources}, "\n".join(lines), as_json)
    return Exit.OK


def _time(hours: float) -> str:
    return f"{hours / 24:,.1f} days" if hours > 48 else f"{hours:,.1f} hours" if hours > 1 else f"{hours * 60:,.0f} min"
