"""Arrow schemas of the four tables, and the way from records to tables and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pyarrow as pa

from latentcache import FORMAT_VERSION, InputError, LatentRecord, PairRecord, SeriesRecord, StoreError

Kind = Literal["catalog", "pairs", "manifest", "timings"]
KINDS: tuple[Kind, ...] = ("catalog", "pairs", "manifest", "timings")


_SCALARS: dict[type, pa.DataType] = {str: pa.string(), int: pa.int32(), float: pa.float64()}


def _column(name: str, hint: Any) -> pa.Field:
    """Return the column of a record's field, from its ``Annotated[type, meaning]`` or ``[type, meaning, Arrow type]``.

    A tuple is a list; ``| None`` makes a column nullable; a ``Literal`` is the type of its values.
    """
    kind, meaning, *given = get_args(hint)
    inner = next(iter(get_args(kind)), kind)
    scalar = pa.type_for_alias(given[0]) if given else _SCALARS[inner if isinstance(inner, type) else type(inner)]
    arrow = pa.list_(pa.field("item", scalar, False)) if get_origin(kind) is tuple else scalar
    return pa.field(name, arrow, get_origin(kind) is UnionType, {"description": meaning})


def _schema(kind: Kind, columns: Iterable[pa.Field]) -> pa.Schema:
    return pa.schema(columns, {"ctpipe.table": kind, "ctpipe.format_version": str(FORMAT_VERSION)})


RECORDS: dict[Kind, type[Any]] = {"catalog": SeriesRecord, "pairs": PairRecord, "manifest": LatentRecord}
_TIMINGS = {
    "key": "series or pair key",
    "encode_key": "hash of the encoding",
    "role": "role of the latent, or empty",
    "stage": "what was timed",
    "outcome": "ok, or the kind of failure",
    "device": "device kind",
}
_VALUES = pa.field(
    "values", pa.map_(pa.string(), pa.float64()), False, {"description": "measured figures by name; times in seconds"}
)


SCHEMAS: dict[Kind, pa.Schema] = {
    kind: _schema(kind, itertools.starmap(_column, get_type_hints(record, include_extras=True).items()))
    for kind, record in RECORDS.items()
}
SCHEMAS["timings"] = _schema(
    "timings",
    [*(pa.field(name, pa.string(), False, {"description": meaning}) for name, meaning in _TIMINGS.items()), _VALUES],
)


UNIQUE: dict[Kind, tuple[str, ...]] = {
    "catalog": ("series_key",),
    "pairs": ("pair_key",),
    "manifest": ("encode_key", "key", "role"),
    "timings": (),
}
"""Columns that identify a row. Of catalog and pairs the last committed row counts, of the manifest the first."""


def to_table(kind: Kind, rows: Iterable[SeriesRecord | PairRecord | LatentRecord]) -> pa.Table:
    """Records of one kind as a table."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMAS[kind])


def timings_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows with any of key, encode_key, role, stage, outcome, device as text; every number goes into ``values``.

    Raises:
        InputError: A value that is neither; free text could carry what must not leave PRIVATE.
    """
    out = []
    for row in rows:
        values = {name: value for name, value in row.items() if name not in _TIMINGS}
        for name, value in values.items():
            if not isinstance(value, (int, float)):
                raise InputError(
                    f"a timing {name!r} of type {type(value).__name__}",
                    expected=f"numbers, besides the texts {', '.join(_TIMINGS)}",
                    remedy="Leave it out or make it a number.",
                )
        texts = {name: str(row.get(name, "")) for name in _TIMINGS}
        out.append({**texts, "values": [(name, float(value)) for name, value in sorted(values.items())]})
    return pa.Table.from_pylist(out, schema=SCHEMAS["timings"])


def from_table(table: pa.Table, record: type[Any]) -> list[Any]:
    """A table's rows as records of the given dataclass; lists become tuples."""
    names = [f.name for f in fields(record)]
    columns = [_tuples(table.column(name)) for name in names]
    return [record(*row) for row in zip(*columns, strict=True)]


def _tuples(column: pa.ChunkedArray) -> list[Any]:
    values = column.to_pylist()
    return [tuple(v) for v in values] if pa.types.is_list(column.type) else values


def matrix(table: pa.Table, name: str) -> np.ndarray[tuple[int, int], np.dtype[Any]]:
    """A list column of equal lengths as an (n, length) array, without a Python object per row.

    Raises:
        InputError: The lengths differ: latents of other channel counts.
    """
    chunks = table.column(name).chunks
    column = pa.concat_arrays(chunks) if chunks else pa.array([], table.schema.field(name).type)
    values = np.asarray(column.flatten().to_numpy(zero_copy_only=False))
    length, odd = divmod(len(values), max(len(column), 1))
    if odd or not np.array_equal(np.diff(np.asarray(column.offsets)), np.full(len(column), length)):
        raise InputError(
            f"rows with unlike numbers of values in {name}",
            expected="latents of one channel count an encoding",
            remedy="Run `ctpipe verify STORE`.",
        )
    return values.reshape(len(column), length)


def check_schema(kind: Kind, found: pa.Schema, path: str) -> None:
    """Refuse a fragment of another table or format.

    Raises:
        StoreError: The columns differ from this version's.
    """
    if not found.equals(SCHEMAS[kind]):
        raise StoreError(
            f"{path} has other columns than the {kind} table of format version {FORMAT_VERSION}",
            expected=f"exactly the {len(SCHEMAS[kind].names)} columns of that table",
            remedy="Run `ctpipe migrate STORE`, or update ctpipe if the store is newer.",
        )
