"""Few rows out of a catalog of a million: fragments are filtered one by one, and only matching ones are read whole."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.records import PairRecord, SeriesRecord
from latentcache.storage import Location
from latentcache.store import LatentStore
from latentcache.tables import SCHEMAS, Fragment, Kind, from_table, read_fragment, unique_rows

KEPT_COLUMNS = 256
_columns: dict[tuple[str, str], pa.ChunkedArray] = {}


def series_where(store: LatentStore, column: str, values: Collection[str]) -> list[SeriesRecord]:
    """Catalog rows whose ``column`` is one of ``values``; of one series the last row."""
    return from_table(_rows(store, "catalog", column, values), SeriesRecord)


def pairs_where(store: LatentStore, column: str, values: Collection[str]) -> list[PairRecord]:
    """Pair rows whose ``column`` is one of ``values``; of one pair the last row."""
    return from_table(_rows(store, "pairs", column, values), PairRecord)


def _column(location: Location, kind: Kind, fragment: Fragment, column: str) -> pa.ChunkedArray:
    """One column of a fragment, kept: fragments never change, and every batch of an ingest asks again."""
    name = (fragment.sha256, column)
    if name not in _columns:
        while len(_columns) >= KEPT_COLUMNS:
            _columns.pop(next(iter(_columns)))
        _columns[name] = read_fragment(location, kind, fragment, [column]).column(column)
    return _columns[name]


def _rows(store: LatentStore, kind: Kind, column: str, values: Collection[str]) -> pa.Table:
    empty = SCHEMAS[kind].empty_table()
    if not values:
        return empty
    wanted = pa.array(sorted(values), pa.string())
    parts: list[Any] = [empty]
    for fragment in store.current_snapshot.fragments[kind]:
        chosen = pc.is_in(_column(store.location, kind, fragment, column), value_set=wanted)
        if pc.any(chosen).as_py():
            parts.append(read_fragment(store.location, kind, fragment).filter(chosen))
    return unique_rows(pa.concat_tables([part.cast(empty.schema) for part in parts]), kind)
