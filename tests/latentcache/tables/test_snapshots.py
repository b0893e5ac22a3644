"""Fragments, snapshots and their compaction."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings, strategies as st

from latentcache import StoreError
from latentcache.storage import FileSystem, LocalLocation
from latentcache.tables import (
    SCHEMAS,
    Fragment,
    Snapshot,
    distinct,
    extend,
    load_snapshot,
    read_table,
    snapshot_path,
    snapshots as manifest,
    unique_rows,
    without_latents,
)
from latentcache.tables.snapshots import COMPACT_AT, _kept, read_row


def pairs(*rows: tuple[str, str]) -> pa.Table:
    blank = dict.fromkeys(SCHEMAS["pairs"].names, "") | {"overlap_mm": [0.0, 1.0]}
    return pa.Table.from_pylist([{**blank, "pair_key": k, "reason": v} for k, v in rows], SCHEMAS["pairs"])


def seen(location: LocalLocation, snapshot: Snapshot) -> list[tuple[str, str]]:
    table = read_table(location, snapshot, "pairs", ("pair_key", "reason"))
    return [(row["pair_key"], row["reason"]) for row in table.to_pylist()]


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=3), max_size=40))
def test_compaction_never_changes_the_table(tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]]) -> None:
    location = LocalLocation(tmp_path_factory.mktemp("m"))
    snapshot, model = Snapshot(0), {}
    for number, batch in enumerate(batches):
        rows = [(f"k{n}", f"{number}.{place}") for place, n in enumerate(batch)]
        model.update(rows)
        snapshot = extend(location, snapshot, {"pairs": pairs(*rows)})
    assert dict(seen(location, snapshot)) == model
    assert len(seen(location, snapshot)) == len(model)
    assert snapshot.number == len(batches)


def test_ten_thousand_commits_leave_few_fragments() -> None:
    fragments: list[Fragment] = []
    rewritten = 0
    for _ in range(10_000):
        kept = _kept(fragments, 1)
        rows = 1 + sum(f.rows for f in fragments[kept:])
        rewritten += rows
        fragments = [*fragments[:kept], Fragment("", rows, 0, "")]
        assert len(fragments) < 5 * COMPACT_AT
    assert sum(f.rows for f in fragments) == 10_000
    assert rewritten < 6 * 10_000


def test_large_fragments_are_left_alone() -> None:
    large = [Fragment("", 100_000, 0, "")] * 3
    assert _kept(large, 100_000) == 3
    assert _kept([*large, *[Fragment("", 1, 0, "")] * (COMPACT_AT - 1)], 1) == 3
    assert _kept([], 1) == 0


def test_of_the_manifest_the_first_row_counts() -> None:
    blank = {f.name: [] if pa.types.is_list(f.type) else "" for f in SCHEMAS["manifest"]}
    blank |= {"z0_mm": 0.0, "dz_mm": 1.0, "round_trip_psnr": None}
    rows = [{**blank, "key": k, "path": p} for k, p in (("a", "1"), ("b", "2"), ("a", "3"))]
    table = unique_rows(pa.Table.from_pylist(rows, SCHEMAS["manifest"]), "manifest")
    assert table.column("path").to_pylist() == ["1", "2"]


def commits(location: LocalLocation, *batches: tuple[str, ...]) -> Snapshot:
    """Manifest rows of one encoding, one fragment a batch; the path tells the batch."""
    blank = {f.name: [] if pa.types.is_list(f.type) else "" for f in SCHEMAS["manifest"]}
    blank |= {"z0_mm": 0.0, "dz_mm": 1.0, "round_trip_psnr": None, "role": "thin"}
    snapshot = Snapshot(0)
    for number, batch in enumerate(batches):
        rows = [{**blank, "key": key, "path": f"{number}/{key}", "encode_key": key[:1]} for key in batch]
        snapshot = extend(location, snapshot, {"manifest": pa.Table.from_pylist(rows, SCHEMAS["manifest"])})
    return snapshot


def test_rows_are_kept_by_what_a_filter_says(tmp_path: Path) -> None:
    location = LocalLocation(tmp_path)
    snapshot = commits(location, ("a1", "b1"), ("a2", "a1", "b2"))
    found = read_table(location, snapshot, "manifest", ("path",), lambda rows: pc.equal(rows["encode_key"], "a"))
    assert found.to_pylist() == [{"path": "0/a1"}, {"path": "1/a2"}]
    assert read_table(location, snapshot, "manifest", keep=lambda rows: pc.equal(rows["key"], "b2")).num_rows == 1
    assert distinct(location, snapshot, "manifest", ("encode_key", "role")).to_pylist() == [
        {"encode_key": "a", "role": "thin"},
        {"encode_key": "b", "role": "thin"},
    ]
    assert distinct(location, Snapshot(0), "manifest", ("role",)).to_pylist() == []


def test_a_row_is_read_by_its_number_over_fragments_and_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "ROW_GROUP", 2)
    location = LocalLocation(tmp_path)
    snapshot = commits(location, ("a1", "b1", "a2"), ("a3", "a1", "b2", "b3", "b4"))
    numbered = read_table(location, snapshot, "manifest", unique=False)
    assert numbered.num_rows == 8
    for row in range(8):
        assert read_row(location, snapshot, "manifest", row).to_pylist() == numbered.slice(row, 1).to_pylist()
    with pytest.raises(IndexError):
        read_row(location, snapshot, "manifest", 8)


def test_only_fragments_that_hold_a_retired_row_are_rewritten(tmp_path: Path) -> None:
    location = LocalLocation(tmp_path)
    base = commits(location, ("a1", "b1"), ("a2",), ("a3", "b3"))
    after = without_latents(location, base, pa.chunked_array([["1/a2", "2/b3", "nowhere"]]))
    assert after.number == base.number + 1
    assert after.fragments["manifest"][0] == base.fragments["manifest"][0]
    assert read_table(location, after, "manifest", ("key",))["key"].to_pylist() == ["a1", "b1", "a3"]
    assert read_table(location, base, "manifest", ("key",)).num_rows == 5


def test_a_missing_snapshot_says_so(tmp_path: Path) -> None:
    location = LocalLocation(tmp_path)
    with pytest.raises(StoreError, match="no snapshot"):
        load_snapshot(location)
    location.put_once(snapshot_path(3), [Snapshot(3).to_json()])
    assert load_snapshot(location).number == 3
    with pytest.raises(StoreError, match="snapshot 2 does not exist"):
        load_snapshot(location, 2)


def resealed(number: int, changes: dict[str, Any]) -> bytes:
    """A snapshot with a valid seal over whatever its maker wanted."""
    body = json.loads(Snapshot(number).to_json()) | changes
    del body["sha256"]
    body["sha256"] = manifest._digest(body)
    return json.dumps(body).encode()


def test_a_snapshot_under_another_number_is_refused(tmp_path: Path) -> None:
    """A copy under a higher number would roll the store back without a word."""
    location = LocalLocation(tmp_path)
    for number in range(3):
        location.put_once(snapshot_path(number), [Snapshot(number).to_json()])
    location.put_once(snapshot_path(99), [location.read(snapshot_path(1))])
    with pytest.raises(StoreError, match=r"00000099\.json holds snapshot 1"):
        load_snapshot(location)
    assert load_snapshot(location, 2).number == 2


ENTRY = {"path": "manifest/0a.parquet", "rows": 1, "size": 1, "sha256": "0" * 64}
BODIES: list[dict[str, Any]] = [
    {"number": "1"},
    {"number": True},
    {"number": None},
    {"fragments": []},
    {"fragments": None},
    {"fragments": {"manifest": []}},
    *(
        {"fragments": {kind: [entry] for kind in SCHEMAS}}
        for entry in (
            ENTRY | {"path": "../victim.parquet"},
            ENTRY | {"path": "manifest/../../victim.parquet"},
            ENTRY | {"path": "/etc/victim.parquet"},
            ENTRY | {"path": 7},
            ENTRY | {"rows": -1},
            ENTRY | {"size": "1"},
            ENTRY | {"sha256": "x"},
            ENTRY | {"more": 1},
            {"path": "manifest/0a.parquet"},
            [],
            "manifest/0a.parquet",
        )
    ),
]


@pytest.mark.parametrize("changes", BODIES)
def test_well_sealed_odd_bodies_are_refused_in_words(tmp_path: Path, changes: dict[str, Any]) -> None:
    location = LocalLocation(tmp_path)
    location.put_once(snapshot_path(1), [resealed(1, changes)])
    with pytest.raises(StoreError):
        load_snapshot(location)


def test_no_path_of_a_stores_file_leads_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("secret")
    location = LocalLocation(tmp_path / "store")
    for path in ("../victim", "a/../../victim", str(tmp_path / "victim")):
        for call in (location.read, location.size, location.delete, location.objects, location.folders, location.child):
            with pytest.raises(StoreError, match="leads out of the store"):
                call(path)
        with pytest.raises(StoreError, match="leads out of the store"):
            list(location.list(path))
        with pytest.raises(StoreError, match="leads out of the store"):
            location.put_once(path, [b""])
    assert (tmp_path / "victim").read_text() == "secret"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, number: int) -> None:
    class ReadOnly(FileSystem):
        def mkdir(self, path: Path) -> None:
            raise OSError(number, os.strerror(number))

        def write(self, path: Path, buffers: Any) -> None:
            raise OSError(number, os.strerror(number))

    location = LocalLocation(tmp_path, ReadOnly())
    for path in ("a", "new/a"):
        with pytest.raises(StoreError, match="cannot be written to"):
            location.put_once(path, [b""])
        with pytest.raises(StoreError, match="cannot be written to"):
            location.put(path, b"")
