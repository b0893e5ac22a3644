"""Scan one archive: what series it holds, from headers alone. Runs in a worker process; nothing here may stop a run."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from latentcache.errors import InputError
from pipeline.archive import open_source
from pipeline.discover import FoundArchive
from pipeline.joined_source import JoinedSource
from pipeline.series import ScannedSeries, pointer_of, scan
from pipeline.zip_directory import StorageError

NO_DICOM = "it holds no DICOM file"


@dataclass(frozen=True)
class ArchiveScan:
    """What one archive gave.

    ``unchanged`` means that the central directory was found as before, so that nothing was read. ``reason`` is set
    when the archive as a whole is set aside; ``detail`` is for PRIVATE alone. ``problems`` are (member name, reason).
    ``unreachable`` means that its place did not answer: what is known of it stands, and the next run asks again.
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

    @property
    def complaint(self) -> str:
        """What to say of the archive as a whole: why it is set aside, or that some of its files cannot be read."""
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
    source = open_source(found.url)
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
    return ArchiveScan(found, digest, series, problems, reason, detail, empty_folder=empty_folder)


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
    from pipeline.volume_reader import read_series

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
    joined = JoinedSource([open_source(url) for url in archives])
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
