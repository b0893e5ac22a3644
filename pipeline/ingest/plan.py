"""What is left to read: archives found against archives known, joined in Arrow without a Python object a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.archive import FoundArchive
from pipeline.identity import Keys


@dataclass(frozen=True)
class ArchivePlan:
    """Positions in the list of found archives.

    Attributes:
        to_scan: Never seen, or changed in size, time or ETag.
        known_digest: For each of ``to_scan``, its digest at the last ingest, or nothing.
        unchanged: Seen, and the file system or object store says that nothing changed.
        relabelled: Those of ``unchanged`` that now lie under another category.
    """

    to_scan: tuple[int, ...]
    known_digest: tuple[str, ...]
    unchanged: tuple[int, ...]
    relabelled: tuple[int, ...]


def found_table(found: Sequence[FoundArchive], keys: Keys) -> pa.Table:
    """Found archives as columns, by key: of a forgotten patient's archive nothing else is kept."""
    return pa.table(
        {
            "archive_key": pa.array([keys.archive(f.url) for f in found], pa.string()),
            "size": pa.array([f.size for f in found], pa.int64()),
            "mtime_ns": pa.array([f.mtime_ns for f in found], pa.int64()),
            "etag": pa.array([f.etag for f in found], pa.string()),
            "category": pa.array([f.category for f in found], pa.string()),
        }
    )


def plan_archives(found: pa.Table, known: pa.Table, rescan: bool = False) -> ArchivePlan:
    """Compare archives by key, size and ETag, or modification time where there is no ETag. Opens nothing.

    Args:
        found: As of :func:`found_table`.
        known: PRIVATE's archives: archive_key, size, mtime_ns, etag, digest, category.
        rescan: Read everything again whatever is known.
    """
    if not len(found):
        return ArchivePlan((), (), (), ())
    row = pc.index_in(found["archive_key"], value_set=one_chunk(known["archive_key"]))
    seen = pc.is_valid(row)
    here = {name: pc.take(one_chunk(known[name]), row) for name in ("size", "mtime_ns", "etag", "digest", "category")}
    tagged = pc.not_equal(found["etag"], "")
    same_stamp = pc.if_else(
        tagged, pc.equal(found["etag"], here["etag"]), pc.equal(found["mtime_ns"], here["mtime_ns"])
    )
    same = pc.and_(seen, pc.and_(pc.equal(found["size"], here["size"]), same_stamp))
    unchanged = np.asarray(pc.fill_null(same, False)) & (not rescan)
    moved = np.asarray(pc.fill_null(pc.not_equal(found["category"], here["category"]), False))
    to_scan = np.flatnonzero(~unchanged)
    digests = pc.fill_null(here["digest"], "").take(pa.array(to_scan)).to_pylist()
    return ArchivePlan(
        to_scan=tuple(to_scan.tolist()),
        known_digest=tuple("" if rescan else d for d in digests),
        unchanged=tuple(np.flatnonzero(unchanged).tolist()),
        relabelled=tuple(np.flatnonzero(unchanged & moved).tolist()),
    )


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
