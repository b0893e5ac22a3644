"""Fragments and snapshots: which files make version n of a store.

A fragment is an immutable Parquet file with rows of one table. A snapshot is an immutable JSON file that lists the
fragments of all tables, with their sizes and SHA-256. Readers hold a snapshot and are never disturbed by later ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentcache import FORMAT_VERSION, StoreError
from latentcache.storage import Location
from latentcache.tables.key_codes import row_codes, surely_distinct
from latentcache.tables.schema import KINDS, SCHEMAS, UNIQUE, Kind, check_schema

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
    """Return how many of the oldest fragments stay as they are when one of ``added`` rows joins.

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


SNAPSHOTS = "snapshots"
DROPPED = b'{"dropped": true}\n'
"""Content of a snapshot's file once it is dropped. The name stays taken: a driver that slept at its put, for however
long, finds it so, and cannot commit a snapshot that is behind the current one."""
_FRAGMENT = re.compile(r"[a-z]+/[A-Za-z0-9_-]+\.parquet")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Keep = Callable[[pa.Table], Any]
ROW_GROUP = 16_384
"""Rows of a Parquet row group: one row of a large fragment costs some ten milliseconds to decode."""


@dataclass(frozen=True)
class Fragment:
    """A Parquet file of one table."""

    path: str
    rows: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Snapshot:
    """Version ``number`` of a store."""

    number: int
    fragments: dict[Kind, tuple[Fragment, ...]] = field(default_factory=lambda: dict.fromkeys(KINDS, ()))

    def to_json(self) -> bytes:
        body: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "number": self.number,
            "fragments": {kind: [asdict(f) for f in self.fragments[kind]] for kind in KINDS},
        }
        body["sha256"] = _digest(body)
        return json.dumps(body, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes, path: str) -> Snapshot:
        """Raises StoreError for a damaged file or another format version."""
        try:
            body = json.loads(data)
            seal = body.pop("sha256")
            version = body["format_version"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path) from error
        check_version(version)
        if seal != _digest(body):
            raise _damaged(path)
        try:
            number = body["number"]
            lists = {kind: tuple(_fragment(kind, f) for f in body["fragments"][kind]) for kind in KINDS}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(path) from error
        if type(number) is not int or snapshot_path(number) != path:
            raise StoreError(
                f"{path} holds snapshot {number}",
                expected="every snapshot under the name of its own number",
                remedy="It was copied or renamed: delete the copy, or restore the file that was there.",
            )
        return cls(number, lists)

    def rows(self, kind: Kind) -> int:
        return sum(f.rows for f in self.fragments[kind])


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _fragment(kind: Kind, entry: dict[str, Any]) -> Fragment:
    """A fragment as a snapshot lists it. Raises ValueError or TypeError for anything else, whatever its seal says."""
    found = Fragment(**entry)
    counts = type(found.rows) is int and type(found.size) is int and min(found.rows, found.size) >= 0
    if not (counts and _FRAGMENT.fullmatch(found.path) and found.path.startswith(f"{kind}/")):
        raise ValueError("no fragment of this table")
    if not _SHA256.fullmatch(found.sha256):
        raise ValueError("no SHA-256")
    return found


def _damaged(path: str) -> StoreError:
    return StoreError(
        f"{path} is damaged",
        expected="a file whose checksum holds",
        remedy="Restore it from a copy of the store, or open an earlier snapshot.",
    )


def check_version(found: object) -> None:
    """Refuse any format version but this one, with the way on.

    Raises:
        StoreError: The store is older or newer.
    """
    if found == FORMAT_VERSION:
        return
    newer = isinstance(found, int) and found > FORMAT_VERSION
    raise StoreError(
        f"a store of format version {found}",
        expected=f"version {FORMAT_VERSION}",
        remedy="Update ctpipe: the store was written by a newer one." if newer else "Run `ctpipe migrate STORE`.",
    )


def snapshot_path(number: int) -> str:
    """Return the path of a snapshot inside the store."""
    return f"{SNAPSHOTS}/{number:08d}.json"


def snapshot_numbers(location: Location) -> list[int]:
    """Numbers of all snapshots that stand, ascending; of those that were dropped only the names are left."""
    entries = (entry for entry in location.list(SNAPSHOTS) if entry.size != len(DROPPED))
    names = (entry.path.rsplit("/", 1)[-1] for entry in entries)
    return sorted(int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit())


def load_snapshot(location: Location, number: int | None = None) -> Snapshot:
    """One snapshot, the current one by default.

    Raises:
        StoreError: No such snapshot, or a damaged or foreign one.
    """
    if number is None:
        numbers = snapshot_numbers(location)
        if not numbers:
            raise StoreError(
                f"{location.url} holds no snapshot",
                expected="at least the first one, made with the store",
                remedy="The copy is incomplete: copy the folder snapshots/ last, after everything else.",
            )
        number = numbers[-1]
    path = snapshot_path(number)
    try:
        data = location.read(path)
    except FileNotFoundError:
        data = DROPPED
    if data == DROPPED:
        raise StoreError(
            f"snapshot {number} does not exist",
            expected="a snapshot that the store still keeps",
            remedy="`ctpipe status STORE` lists them; removed patients and gc --expire take old ones away.",
        )
    return Snapshot.from_json(data, path)


def has_snapshot(location: Location, number: int) -> bool:
    """Whether a snapshot is there."""
    try:
        return location.size(snapshot_path(number)) != len(DROPPED)
    except FileNotFoundError:
        return False


def drop_snapshot(location: Location, number: int) -> None:
    """Remove what a snapshot says and leave its name taken, see ``DROPPED``. Repeating it is harmless."""
    location.put(snapshot_path(number), DROPPED)


def write_fragment(location: Location, kind: Kind, table: pa.Table) -> Fragment:
    """Write rows as a new fragment; nothing refers to it until a snapshot does."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", store_schema=True, row_group_size=ROW_GROUP)
    data = sink.getvalue().to_pybytes()
    path = f"{kind}/{uuid.uuid4().hex}.parquet"
    location.put_once(path, [data])
    return Fragment(path, table.num_rows, len(data), hashlib.sha256(data).hexdigest())


def read_fragment(
    location: Location,
    kind: Kind,
    fragment: Fragment,
    columns: Sequence[str] | None = None,
    checked: set[str] | None = None,
) -> pa.Table:
    """A fragment's rows; its bytes are checked first.

    Args:
        checked: Fragments whose bytes this reader has checked before and need not be hashed again; added to.

    Raises:
        StoreError: The file is missing, damaged or of another format.
    """
    file = _open_fragment(location, kind, fragment, checked)
    return file.read(columns=None if columns is None else list(columns))


def _open_fragment(
    location: Location, kind: Kind, fragment: Fragment, checked: set[str] | None = None
) -> pq.ParquetFile:
    # Arrow's threads let go of it last. Python's memory would need an interpreter for that: a program that ends just
    # then would abort.
    buffer = pa.allocate_buffer(fragment.size)
    data: Any = np.frombuffer(buffer, np.uint8)
    try:
        for _ in location.read_into(fragment.path, 0, [[data]]):
            pass
    except EOFError as error:
        raise _damaged(fragment.path) from error
    except FileNotFoundError as error:
        raise StoreError(
            f"{fragment.path} is missing, though the snapshot lists it",
            expected="every fragment of the snapshot",
            remedy="The store is a partial copy: copy it again, snapshots/ last.",
        ) from error
    known = checked is not None and fragment.path in checked
    if not (known or hashlib.sha256(data).hexdigest() == fragment.sha256):
        raise _damaged(fragment.path)
    if checked is not None:
        checked.add(fragment.path)
    file = pq.ParquetFile(pa.BufferReader(buffer))
    check_schema(kind, file.schema_arrow, fragment.path)
    return file


def read_row(location: Location, snapshot: Snapshot, kind: Kind, row: int, checked: set[str] | None = None) -> pa.Table:
    """One row by its number over all fragments in turn, as a table; decodes that row's group alone."""
    for fragment in snapshot.fragments[kind]:
        if row >= fragment.rows:
            row -= fragment.rows
            continue
        file = _open_fragment(location, kind, fragment, checked)
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if row < count:
                return file.read_row_group(group).slice(row, 1).select(SCHEMAS[kind].names).cast(SCHEMAS[kind])
            row -= count
    raise IndexError(f"no such row in the {kind} table")


def distinct(
    location: Location, snapshot: Snapshot, kind: Kind, columns: Sequence[str], checked: set[str] | None = None
) -> pa.Table:
    """The combinations of values that a few columns take; much cheaper than the rows, since none is distinguished."""
    names = list(columns)
    schema = pa.schema([SCHEMAS[kind].field(name) for name in names])
    parts = [schema.empty_table()]
    for fragment in snapshot.fragments[kind]:
        part = read_fragment(location, kind, fragment, names, checked).select(names).cast(schema)
        parts.append(_first_of_each(part, names))
    return _first_of_each(pa.concat_tables(parts), names)


def _first_of_each(table: pa.Table, names: Sequence[str]) -> pa.Table:
    return table.group_by(list(names), use_threads=False).aggregate([]).select(list(names))


def read_table(
    location: Location,
    snapshot: Snapshot,
    kind: Kind,
    columns: Sequence[str] | None = None,
    keep: Keep | None = None,
    *,
    unique: bool = True,
    checked: set[str] | None = None,
) -> pa.Table:
    """All rows of a table in a snapshot, each identity once (see schema.UNIQUE), in order of first appearance.

    Args:
        unique: False leaves later rows of an identity in, so that rows are numbered as in ``read_row``.
        keep: Which rows, as a boolean mask over the columns that identify a row, which are read first, a row group at
            a time: memory is that of the rows kept and of one fragment's file. (All rows of one identity must share
            one answer, or a row that a later one replaced would show.)
    """
    identity = UNIQUE[kind]
    wanted = None if columns is None else list(dict.fromkeys([*columns, *identity]))
    schema = SCHEMAS[kind]
    if wanted is not None:
        schema = pa.schema([schema.field(name) for name in wanted], schema.metadata)
    parts = [schema.empty_table()]
    for fragment in snapshot.fragments[kind]:
        if keep is None:
            parts.append(read_fragment(location, kind, fragment, wanted, checked).select(schema.names).cast(schema))
        else:
            parts += _rows_kept(_open_fragment(location, kind, fragment, checked), schema, identity, keep)
    table = pa.concat_tables(parts)
    if unique and len(parts) > 2 and identity:
        table = unique_rows(table, kind)
    return table if columns is None else table.select(list(columns))


def _rows_kept(file: pq.ParquetFile, schema: pa.Schema, identity: Sequence[str], keep: Keep) -> Iterator[pa.Table]:
    """Every row group's rows that are wanted; of one that has none, no other column is decoded."""
    others = [name for name in schema.names if name not in identity]
    for group in range(file.num_row_groups):
        known = file.read_row_group(group, list(identity))
        mask = keep(known)
        if not pc.any(mask).as_py():
            continue
        rest = file.read_row_group(group, others)
        both = [known[name] if name in identity else rest[name] for name in schema.names]
        part = pa.Table.from_arrays(both, schema=schema)
        yield part if pc.all(mask).as_py() else part.filter(mask)


def unique_rows(table: pa.Table, kind: Kind) -> pa.Table:
    """One row an identity: of catalog and pairs the last, of the manifest the first; in order of first appearance."""
    if surely_distinct(table, UNIQUE[kind]):
        return table
    codes = row_codes(table, UNIQUE[kind])
    _, first = np.unique(codes, return_index=True)
    if len(first) == len(codes):
        return table
    if kind == "manifest":
        return table.take(pa.array(np.sort(first)))
    _, last = np.unique(codes[::-1], return_index=True)
    return table.take(pa.array((len(codes) - 1 - last)[np.argsort(first)]))
