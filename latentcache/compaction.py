"""The next snapshot from the last: rows added and small fragments merged, or latents taken out."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.location import Location
from latentcache.manifest import Fragment, Snapshot, read_fragment, unique_rows, write_fragment
from latentcache.schema import UNIQUE, Kind

COMPACT_AT = 16
"""Fragments of one size class at which a commit merges them: opening a store stays cheap after 10,000 commits."""


def extend(location: Location, base: Snapshot, added: dict[Kind, pa.Table]) -> Snapshot:
    """The next snapshot: ``base`` with rows added, the newest fragments merged where they have become many.

    Writes the new fragments; nothing refers to them until the snapshot is committed.
    """
    lists = dict(base.fragments)
    for kind, table in added.items():
        if table.num_rows == 0:
            continue
        kept = _kept(lists[kind], table.num_rows)
        for fragment in reversed(lists[kind][kept:]):
            table = pa.concat_tables([read_fragment(location, kind, fragment), table])
        if UNIQUE[kind]:
            table = unique_rows(table, kind)
        lists[kind] = (*lists[kind][:kept], write_fragment(location, kind, table))
    return Snapshot(base.number + 1, lists)


def without_latents(location: Location, base: Snapshot, paths: pa.ChunkedArray) -> Snapshot:
    """The next snapshot: ``base`` without the manifest rows of these paths. Only fragments that hold one are rewritten.

    Every fragment keeps its place, since of two rows of one identity the first counts.
    """
    wanted = paths.combine_chunks()
    manifest: list[Fragment] = []
    for fragment in base.fragments["manifest"]:
        gone = pc.is_in(read_fragment(location, "manifest", fragment, ("path",))["path"], value_set=wanted)
        if not pc.any(gone).as_py():
            manifest.append(fragment)
            continue
        table = read_fragment(location, "manifest", fragment).filter(pc.invert(gone))
        if table.num_rows:
            manifest.append(write_fragment(location, "manifest", table))
    return Snapshot(base.number + 1, {**base.fragments, "manifest": tuple(manifest)})


def _kept(fragments: Sequence[Fragment], added: int) -> int:
    """How many of the oldest fragments stay as they are when a fragment of ``added`` rows joins.

    Of every size class (powers of COMPACT_AT) fewer than COMPACT_AT fragments are kept, so that n commits leave
    O(log n) classes and rewrite each row O(log n) times.
    """
    kept, rows, size = len(fragments), added, COMPACT_AT
    while True:
        tail = kept
        while tail > 0 and fragments[tail - 1].rows < size:
            tail -= 1
        if kept - tail + (rows < size) >= COMPACT_AT:
            rows += sum(f.rows for f in fragments[tail:kept])
            kept = tail
        elif rows < size:
            return kept
        if tail == 0:
            return kept
        size *= COMPACT_AT
