"""Scan one archive: what series it holds, from headers alone. Runs in a worker process; nothing here may stop a run."""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field, replace

from latentcache import InputError
from pipeline.archive import UNREADABLE_FILE, FoundArchive, JoinedSource, StorageError, open_archive
from pipeline.engines import EngineOptions, Outcome, Stage, stream
from pipeline.reading import ScannedSeries, pointer_of, scan

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


def _scan_on_worker(state: str, turn: Turn) -> ArchiveScan:
    return scan_archive(*turn.job)


def scans_in_order(jobs: Iterable[ScanJob], options: EngineOptions) -> Generator[ArchiveScan, None, None]:
    """Scan archives on an engine's workers; one that kills or outlasts them is excluded with the reason.

    Raises:
        InputError: The cluster is not there, or no worker can start.
    """
    stage = Stage(prepare=_as_is, setup=_no_state, run=_scan_on_worker)
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


NO_DICOM = "it holds no DICOM file"


@dataclass(frozen=True)
class ArchiveScan:
    """Result of scanning one archive.

    ``unchanged`` means that the central directory was found as before, so that nothing was read. ``reason`` is set
    when the archive as a whole is excluded; ``detail`` is for PRIVATE alone. ``problems`` are (member name, reason).
    ``unreachable`` means that its place did not answer: what is known of it is kept, and the next run asks again.
    ``ask_again`` means that some of its files would not open, which no listing shows to have changed.
    """

    found: FoundArchive
    digest: str = ""
    series: tuple[ScannedSeries, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    detail: str = field(default="", repr=False)
    unchanged: bool = False
    unreachable: bool = False
    empty_folder: bool = False
    ask_again: bool = False

    @property
    def complaint(self) -> str:
        """Return the complaint about the archive: why it is excluded, or that some of its files cannot be read."""
        if self.empty_folder or self.reason or not self.problems:
            return "" if self.empty_folder else self.reason
        why, times = Counter(reason for _, reason in self.problems).most_common(1)[0]
        more = f", {times} of them" if times < len(self.problems) else ""
        return f"{len(self.problems)} of its files cannot be read{more}: {why}"


def scan_archive(found: FoundArchive, known_digest: str = "", verify_pixels: bool = False) -> ArchiveScan:
    """Scan an archive. Whatever is wrong with it comes back as a reason, never as an exception.

    Args:
        found: The archive.
        known_digest: Digest at the last ingest; where it still holds, no member is opened.
        verify_pixels: Decode every series too and quarantine those whose pixels are broken.
    """
    if found.refusal:
        return ArchiveScan(found, reason=found.refusal, unreachable=True)
    try:
        return _scan(found, known_digest, verify_pixels)
    except StorageError as error:
        return ArchiveScan(found, reason=error.found, detail=str(error), unreachable=True)
    except InputError as error:
        return ArchiveScan(found, reason=error.found, detail=str(error))
    except Exception as error:  # noqa: BLE001  one archive, however odd, must not stop ten thousand others
        reason = f"an unforeseen {type(error).__name__} while reading it; its traceback is in the private part"
        return ArchiveScan(found, reason=reason, detail=traceback.format_exc())


def _scan(found: FoundArchive, known_digest: str, verify_pixels: bool) -> ArchiveScan:
    source = open_archive(found.url)
    try:
        digest = source.digest
        if known_digest and digest == known_digest:
            return ArchiveScan(found, digest, unchanged=True)
        result = scan(source)
        names = {member.index: member.name for member in source.members()}
        problems = tuple((names.get(index, ""), reason) for index, reason in result.problems)
        series = tuple(result.series)
    finally:
        source.close()
    if verify_pixels:
        series = tuple(verified(one) for one in series)
    reason = "" if series else _why_nothing(len(names), [why for _, why in problems])
    detail = "; ".join(f"{name}: {why}" for name, why in problems[:20])
    # A folder of notes beside the archives is nobody's lost study; a zip without DICOM may be.
    empty_folder = bool(reason) and not problems and not found.url.casefold().endswith(".zip")
    ask_again = any(why == UNREADABLE_FILE for _, why in problems)
    return ArchiveScan(found, digest, series, problems, reason, detail, empty_folder=empty_folder, ask_again=ask_again)


def _why_nothing(members: int, problems: Sequence[str]) -> str:
    """Why an archive gave no series, in words without names."""
    if not members:
        return "it is empty"
    if not problems:
        return NO_DICOM
    why, times = Counter(problems).most_common(1)[0]
    return f"none of its {len(problems)} images can be read; {times} of them: {why}"


def verified(series: ScannedSeries) -> ScannedSeries:
    """The series as it is when all its pixels decode, else quarantined with the reason."""
    from pipeline.reading import read_series

    if series.status != "ok":
        return series
    try:
        read_series(pointer_of(series))
    except StorageError:
        raise
    except InputError as error:
        return replace(series, status="quarantined", reason=error.found)
    return series


def scan_joined(archives: Sequence[str], series_uids: set[str]) -> list[ScannedSeries]:
    """Series that are spread over several archives, assembled from all of them.

    Args:
        archives: URLs of the archives that hold parts.
        series_uids: SeriesInstanceUIDs that more than one of them holds.
    """
    joined = JoinedSource([open_archive(url) for url in archives])
    try:
        whole = [one for one in scan(joined).series if one.series_uid in series_uids]
    finally:
        joined.close()
    return [
        replace(
            one,
            pointer_members=tuple((*joined.origin(index), frame) for _, index, frame in one.pointer_members),
        )
        for one in whole
    ]
