"""Cases of an evaluation as items of an engine: what a worker needs of each, and how it gets ready for them.

A worker gets places of slices, never PRIVATE: who is who stays with the driver.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from latentcache.errors import CtpipeError
from latentcache.records import PairRecord
from pipeline.encode import Encoder
from pipeline.engine import EngineOptions, Outcome, Stage, stream
from pipeline.evaluate import CaseScores, failed
from pipeline.evaluate_methods import CaseWork
from pipeline.log_lines import note
from pipeline.protocol_fit import ProtocolFit
from pipeline.seen_folder import check_seen, mark
from pipeline.threads import pin
from pipeline.volume import SeriesPointer

log = logging.getLogger("ctpipe.evaluate")


@dataclass(frozen=True)
class Places:
    """Where one pair's series lie: the part of PRIVATE that scoring needs."""

    pointers: Mapping[str, SeriesPointer]

    def pointer(self, series_key: str) -> SeriesPointer:
        return self.pointers[series_key]


@dataclass(frozen=True)
class CaseTask:
    """One pair to score. ``problem`` is why the driver could not say where it lies."""

    pair: PairRecord
    places: Places = Places({})
    fit: ProtocolFit | None = None
    view_folder: Path | None = None
    problem: CtpipeError | None = None

    @property
    def key(self) -> str:
        return self.pair.pair_key


Score = Callable[[CaseWork, PairRecord, ProtocolFit | None, Path | None], CaseScores]


def as_it_is(task: CaseTask) -> CaseTask:
    """The stage's CPU part. Pixels are read where they are scored, so that two thin volumes at most are in memory."""
    return task


def get_ready(
    device: str, *, work: CaseWork, load: Callable[[str], Encoder] | None, seen: Path, threads: int | None
) -> CaseWork:
    """A worker's state: the work with a VAE of its own, where the driver's cannot be shared."""
    check_seen(seen)
    if threads is not None:
        pin(threads)
    return work if load is None else replace(work, vae=load(device))


def run_case(work: CaseWork, task: CaseTask, *, score: Score, threads: int | None) -> CaseScores:
    """The stage's device part. A pair that cannot be compared is a case that says so; anything else is the engine's."""
    if threads is not None:
        pin(threads)
    pair = task.pair
    try:
        if task.problem is not None:
            raise task.problem
        return score(replace(work, private=task.places), pair, task.fit, task.view_folder)
    except CtpipeError as error:
        note(log, "set_aside", logging.WARNING, f"pair {pair.pair_key} could not be evaluated: {error}",
             series_key=pair.pair_key, stage="evaluate", outcome=type(error).__name__)  # fmt: skip
        return failed(pair.pair_key, pair.category, pair.patient_key, str(error))


def spread_cases(
    tasks: Sequence[CaseTask],
    work: CaseWork,
    score: Score,
    options: EngineOptions,
    folder: Path,
    load: Callable[[str], Encoder] | None,
    threads: int | None,
) -> Generator[Outcome[CaseTask, CaseScores], None, None]:
    """Score tasks on an engine; outcomes as they come.

    Raises:
        InputError: No worker can start, or one sees another folder.
    """
    if not tasks:
        return
    with mark(folder.absolute()) as seen:
        stage: Stage[CaseTask, CaseTask, CaseWork, CaseScores] = Stage(
            prepare=as_it_is,
            setup=functools.partial(get_ready, work=work, load=load, seen=seen, threads=threads),
            run=functools.partial(run_case, score=score, threads=threads),
        )
        with contextlib.closing(stream(tasks, stage, options)) as outcomes:
            yield from outcomes
