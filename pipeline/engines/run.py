"""Wiring without logic: runs pure stage functions over items, in threads through dask, on a dask cluster, or on Ray.

Every backend obeys one contract, ``stream``: ``prepare(item)`` runs on CPU workers ahead of time, ``run(state,
prepared)`` runs where the state that ``setup(device)`` made lives (one per device), and outcomes arrive in order of
completion. An item that fails is an outcome with an error, never an exception, so the rest of a batch goes on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from pipeline.engines.contract import EngineOptions, Outcome, P, R, S, Stage, T
from pipeline.engines.group_commit import Done, GroupCommit
from pipeline.engines.job_log import note
from pipeline.engines.local import _embedded_dask, _inline
from pipeline.engines.progress import Progress

StageName = Literal["encode", "sample", "decode"]
WORDS: dict[StageName, tuple[str, str]] = {
    "encode": ("task", "encoded"),
    "sample": ("pair", "sampled"),
    "decode": ("series", "decoded"),
}
"""Name of a stage's item in messages, and the event of one that is done."""


@dataclass
class StageTotals:
    """Totals of a stage.

    Attributes:
        failed: Reasons of the items that were excluded, by name.
        seconds: Time by part of the work, over all items.
    """

    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


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


def run_stage(
    items: Iterable[T],
    stage: Stage[T, P, S, R],
    options: EngineOptions,
    *,
    name: StageName,
    progress: Progress,
    commit: GroupCommit | None = None,
    on_outcome: Callable[[Outcome[T, R]], Mapping[str, int]],
) -> StageTotals:
    """Run a stage to its end in the driver: one log line per item, progress in the store, commits in groups.

    Items bear their key as ``name`` or ``key``. One that fails is excluded with its reason, and the others go on.

    Args:
        items: What is worked on.
        stage: The three functions.
        options: The engine.
        name: Names the stage in the log, in the timings and in ``ctpipe status``.
        progress: The file of counts, which is removed at the end.
        commit: Commits staged latents; it also counts progress. Entered and left here.
        on_outcome: Called with each outcome; returns figures for the log line of one that succeeded.
    """
    log, totals = logging.getLogger(f"ctpipe.{name}"), StageTotals()
    noun, done = WORDS[name]
    with commit or contextlib.nullcontext(), contextlib.closing(stream(items, stage, options)) as outcomes:
        for number, outcome in enumerate(outcomes, 1):
            if commit is not None:
                commit.put(cast("Done", outcome))
            else:
                progress.note(number, number)
            figures: dict[str, Any] = {**on_outcome(outcome)}
            key = _key(outcome.item)
            if outcome.value is None:
                totals.failed[key] = outcome.error or "unknown"
                text, kind = f"{noun} {key} set aside: {outcome.error}", outcome.error_kind or "unknown"
                note(log, "set_aside", logging.WARNING, text, series_key=key, stage=name, outcome=kind)
            else:
                took = round(sum(outcome.seconds.values()), 6)
                note(log, done, series_key=key, stage=name, seconds=took, outcome="ok", **figures)
            for part, value in outcome.seconds.items():
                totals.seconds[part] = totals.seconds.get(part, 0.0) + value
    progress.end()
    return totals


def _key(item: Any) -> str:
    return str(item.name if hasattr(item, "name") else item.key)
