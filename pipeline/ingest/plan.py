"""Archives left to read: those found against those known, joined in Arrow without a Python object per row."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.archive import FoundArchive
from pipeline.identity import Keys

KNOWN = ("archive_key", "size", "mtime_ns", "etag", "digest", "category")
FIRST_PORTION, LARGEST_PORTION = 256, 65_536
"""Archives compared at once: few at first, so that reading begins while the tree is still being listed."""


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


class ListingPlan:
    """Compares archives with what is known of them while they are being found, a portion at a time.

    Attributes:
        counts: Archives by outcome so far: new, changed, unchanged, excluded.
        left_out: URLs of archives that the user excludes.
        relabelled: New category, by URL, of unchanged archives that now lie under another one.
        unusable_gone: Keys of what could not be used before; complete, once ``jobs`` is exhausted, with those alone
            that were not found again.
    """

    def __init__(
        self,
        found: Iterable[FoundArchive],
        known: pa.Table,
        keys: Keys,
        excludes: Callable[[str], bool] = lambda url: False,
        rescan: bool = False,
        unusable: Iterable[str] = (),
    ) -> None:
        self._found, self._known, self._keys = iter(found), known, keys
        self._excludes, self._rescan = excludes, rescan
        self.counts: Counter[str] = Counter()
        self.left_out: list[str] = []
        self.relabelled: dict[str, str] = {}
        self.unusable_gone = set(unusable)

    @property
    def to_scan(self) -> int:
        """Archives to read, as far as the tree has been listed."""
        return self.counts["new"] + self.counts["changed"]

    def jobs(self) -> Iterator[tuple[FoundArchive, str]]:
        """Yield archives to read, each with its digest at the last ingest or nothing. To be consumed once."""
        size = FIRST_PORTION
        while portion := list(itertools.islice(self._found, size)):
            yield from self._compare(portion)
            size = min(2 * size, LARGEST_PORTION)

    def _compare(self, portion: Sequence[FoundArchive]) -> list[tuple[FoundArchive, str]]:
        named = [self._excludes(one.url) for one in portion]
        self.left_out += [one.url for one, excluded in zip(portion, named, strict=True) if excluded]
        kept = [one for one, excluded in zip(portion, named, strict=True) if not excluded]
        table = found_table(kept, self._keys)
        if self.unusable_gone:
            self.unusable_gone.difference_update(table["archive_key"].to_pylist())
        plan = plan_archives(table, self._known, self._rescan)
        self.relabelled.update({kept[i].url: kept[i].category for i in plan.relabelled})
        new = sum(not digest for digest in plan.known_digest)
        self.counts.update(
            new=new,
            changed=len(plan.to_scan) - new,
            unchanged=len(plan.unchanged),
            excluded=len(portion) - len(kept),
        )
        return [(kept[i], digest) for i, digest in zip(plan.to_scan, plan.known_digest, strict=True)]


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    combined = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
