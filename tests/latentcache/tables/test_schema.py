"""Tables and records say the same."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pytest

from latentcache import InputError, LatentRecord, PairRecord, SeriesRecord, StoreError
from latentcache.tables import KINDS, SCHEMAS, timings_table
from latentcache.tables.schema import UNIQUE, Kind, check_schema

PINNED = Path(__file__).resolve().parents[2] / "golden" / "arrow_schemas.txt"


def described(kind: Kind, schema: pa.Schema) -> list[str]:
    about = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    return [f"store {kind} {about}"] + [
        f"    {f.name}: {f.type}{'' if f.nullable else ' not null'} # {f.metadata[b'description'].decode()}"
        for f in schema
    ]


def test_the_tables_of_this_format_version_are_as_released() -> None:
    """Order, types, nullability and metadata; anything else is another format version and needs a migration."""
    lines = [line for kind in KINDS for line in described(kind, SCHEMAS[kind])]
    assert lines == PINNED.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("kind", "record"), [("catalog", SeriesRecord), ("pairs", PairRecord), ("manifest", LatentRecord)]
)
def test_columns_are_the_records_fields(kind: str, record: type) -> None:
    assert SCHEMAS[kind].names == [f.name for f in fields(record)]  # type: ignore[index]


@pytest.mark.parametrize("kind", KINDS)
def test_every_column_says_what_it_means(kind: str) -> None:
    schema = SCHEMAS[kind]  # type: ignore[index]
    assert all(schema.field(name).metadata[b"description"] for name in schema.names)
    assert set(UNIQUE[kind]) <= set(schema.names)  # type: ignore[index]


def test_other_columns_are_refused() -> None:
    check_schema("pairs", SCHEMAS["pairs"], "pairs/x.parquet")
    with pytest.raises(StoreError, match="other columns"):
        check_schema("pairs", SCHEMAS["pairs"].append(pa.field("extra", pa.string())), "pairs/x.parquet")


def test_timings_keep_numbers_and_refuse_free_text() -> None:
    row = timings_table([{"key": "k", "device": "cpu", "encode_s": 2, "read_s": 0.5}]).to_pylist()[0]
    assert row["values"] == [("encode_s", 2.0), ("read_s", 0.5)]
    assert (row["key"], row["device"], row["outcome"]) == ("k", "cpu", "")
    with pytest.raises(InputError, match="str"):
        timings_table([{"key": "k", "folder": "Jane"}])
