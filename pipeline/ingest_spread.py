"""Scanning on a cluster: an archive is an item of the engine, and scans come back in the order of the archives.

What workers send back are headers, identity included: they travel inside the cluster and are kept by the driver alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from pipeline.discover import FoundArchive
from pipeline.engine import EngineOptions, Outcome, Stage, stream
from pipeline.ingest_scan import ArchiveScan, scan_archive

CRASHED = "the reader crashed on it, so it is left out"
SLOW = "reading it took longer than the time allowed, so it is left out"

ScanJob = tuple[FoundArchive, str, bool]
"""Arguments of `scan_archive`."""


@dataclass(frozen=True)
class Turn:
    """A job with its place in the order."""

    number: int
    job: ScanJob


def _as_is(turn: Turn) -> Turn:
    return turn


def _no_state(device: str) -> str:
    return device


def _scan(state: str, turn: Turn) -> ArchiveScan:
    return scan_archive(*turn.job)


def scans_in_order(jobs: Sequence[ScanJob], options: EngineOptions) -> Generator[ArchiveScan, None, None]:
    """Scan archives on an engine's workers; one that kills or outlasts them is set aside with the reason.

    Raises:
        InputError: The cluster is not there, or no worker can start.
    """
    stage = Stage(prepare=_as_is, setup=_no_state, run=_scan)
    early: dict[int, ArchiveScan] = {}
    due = 0
    turns = (Turn(number, job) for number, job in enumerate(jobs))
    with contextlib.closing(stream(turns, stage, options)) as outcomes:
        for outcome in outcomes:
            early[outcome.item.number] = _scan_of(outcome)
            while due in early:
                yield early.pop(due)
                due += 1


def _scan_of(outcome: Outcome[Turn, ArchiveScan]) -> ArchiveScan:
    if outcome.value is not None:
        return outcome.value
    reason = SLOW if outcome.error_kind == "Timeout" else CRASHED
    return ArchiveScan(outcome.item.job[0], reason=reason, detail=outcome.error or "")
