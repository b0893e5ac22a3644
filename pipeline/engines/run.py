"""Wiring without logic: runs pure stage functions over items, in threads through dask, on a dask cluster, or on Ray.

Every backend obeys one contract, ``stream``: ``prepare(item)`` runs on CPU workers ahead of time, ``run(state,
prepared)`` runs where the state that ``setup(device)`` made lives (one a device), and outcomes arrive in order of
completion. An item that fails is an outcome with an error, never an exception, so the rest of a batch goes on.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

from pipeline.engines.contract import EngineOptions, Outcome, P, R, S, Stage, T
from pipeline.engines.local import _embedded_dask, _inline


def stream(
    items: Iterable[T], stage: Stage[T, P, S, R], options: EngineOptions
) -> Generator[Outcome[T, R], None, None]:
    """Run a stage over items and yield outcomes as they complete, holding a bounded number in memory."""
    if options.name == "inline":
        yield from _inline(items, stage, options)
    elif options.name == "ray":
        from pipeline.engines.ray_cluster import ray_stream

        yield from ray_stream(items, stage, options)
    elif options.scheduler:
        from pipeline.engines.dask_cluster import cluster_stream

        yield from cluster_stream(items, stage, options)
    else:
        yield from _embedded_dask(items, stage, options)
