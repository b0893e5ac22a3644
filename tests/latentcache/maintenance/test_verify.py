"""Verify finds what is wrong anywhere; gc takes what is garbage and nothing else."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from latentcache import InputError, LatentStore, StoreError
from latentcache.maintenance import collect, pin, pinned_snapshots, verify
from latentcache.maintenance.pins import unpin
from latentcache.tables import Snapshot, to_table, write_fragment
from tests.latentcache.test_store import ENCODING, key, latent, series, stage


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    made = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    made.register_encoding(ENCODING)
    made.append_catalog([series(1), series(2)])
    with made.writer() as writer:
        writer.commit([stage(made, 1, latent(5, size=2))])
        writer.commit([stage(made, 2, latent(5, size=2))], [{"key": key(2), "s": 1}])
    return made


def test_a_sound_store_has_no_problem(store: LatentStore) -> None:
    result = verify(store)
    assert result.ok
    assert (result.latents, result.snapshots, result.fragments, result.encodings) == (2, 4, 4, 1)


def test_a_flipped_bit_anywhere_is_found(store: LatentStore) -> None:
    """In every file that a snapshot names: arrays, their metadata, fragments, snapshots, encodings."""
    random = np.random.default_rng(0)
    files = [p for p in sorted(Path(store.url).rglob("*")) if p.is_file() and p.name != "store.json"]
    assert len(files) == 4 + 4 + 4 + 1
    for path in files:
        good = path.read_bytes()
        for byte in {0, len(good) - 1, *random.integers(0, len(good), 12).tolist()}:
            bad = bytearray(good)
            bad[byte] ^= 1 << int(random.integers(8))
            if path.suffix == ".json" and path.name != "zarr.json" and bad.split() == good.split():
                continue
            path.write_bytes(bad)
            try:
                found = not verify(LatentStore.open(store.url, snapshot=3)).ok
            except StoreError:
                found = True
            assert found, f"{path.name} byte {byte}"
        path.write_bytes(good)
    assert verify(store).ok


def test_rows_without_arrays_and_arrays_without_rows(store: LatentStore) -> None:
    stage(store, 1)
    assert verify(store).ok
    assert verify(store).orphans == 1
    row = store.records()[0]
    for path in (Path(store.url) / row.path).iterdir():
        path.unlink()
    assert [p.subject for p in verify(store).problems] == [f"{row.key} thin"]


def test_a_row_that_says_something_else_than_its_array_is_found(store: LatentStore) -> None:
    row = stage(store, 3, latent(5, size=2))
    wrong = [
        replace(row, mean=(0.5, *row.mean[1:])),
        replace(row, sha256="0" * 64),
        replace(row, shape=(4, 6, 2, 2)),
        replace(row, encode_key="e" * 16),
        replace(row, valid_zyx=(400, 8, 8)),
    ]
    for each in wrong:
        fragment = write_fragment(store.location, "manifest", to_table("manifest", [each]))
        base = store.current_snapshot
        store._snapshot = Snapshot(base.number, {**base.fragments, "manifest": (fragment,)})
        store._tables.clear()
        subjects = {p.subject for p in verify(store).problems}
        assert f"{row.key} thin" in subjects
        assert row.key in subjects  # nor is it in the catalog
        store._snapshot = base


def age(root: Path, hours: float) -> None:
    then = time.time() - hours * 3600
    for path in root.rglob("*"):
        os.utime(path, (then, then))


def test_gc_spares_what_is_named_or_young(store: LatentStore) -> None:
    root = Path(store.url)
    old = stage(store, 3)
    write_fragment(store.location, "pairs", pa.Table.from_pylist([], to_table("pairs", []).schema))
    (root / "manifest" / ".aside-1").write_bytes(b"half")
    (root / ".aside-2").write_bytes(b"half")
    (root / "latents.zarr" / ENCODING.encode_key / key(9) / "thin" / "attempt").mkdir(parents=True)
    (root / "latents.zarr" / ENCODING.encode_key / key(9) / "thin" / "attempt" / ".aside-3").write_bytes(b"half")
    age(root, 25)
    young = stage(store, 4)
    plan = collect(store, dry_run=True)
    assert (plan.attempts, plan.fragments, plan.asides, plan.snapshots, plan.objects) == (2, 1, 2, 0, 6)
    assert (root / old.path).exists()
    assert collect(store) == plan
    assert collect(store).objects == 0
    assert not (root / old.path).exists()
    assert not list(root.rglob(".aside-*"))
    np.testing.assert_array_equal(store.read(young), latent(seed=4))
    assert verify(store).ok


def test_gc_expires_only_old_unpinned_snapshots(store: LatentStore) -> None:
    pin(store.location, "run-1", 1)
    pin(store.location, "run-2", 1)
    assert pinned_snapshots(store.location) == {1: ["run-1", "run-2"]}
    age(Path(store.url), 25)
    assert collect(store).snapshots == 0
    found = collect(store, expire_snapshots=True)
    assert found.snapshots == 2
    assert len(LatentStore.open(store.url, snapshot=1).series()) == 2
    assert len(LatentStore.open(store.url).records()) == 2
    with pytest.raises(StoreError, match="does not exist"):
        LatentStore.open(store.url, snapshot=0)
    unpin(store.location, "run-1")
    unpin(store.location, "run-2")
    unpin(store.location, "run-2")
    age(Path(store.url), 25)
    assert collect(store, expire_snapshots=True).snapshots == 2  # the pinned one, and what was current before gc
    assert verify(LatentStore.open(store.url)).ok


def test_pins_name_what_exists(store: LatentStore) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        pin(store.location, "run", 99)
    with pytest.raises(InputError, match="pin name"):
        pin(store.location, "../run", 0)
    assert pinned_snapshots(store.location) == {}


def test_gc_reaches_generated_stores(store: LatentStore) -> None:
    child = store.generated(key(7), create=True)
    child.register_encoding(ENCODING)
    stage(child, 1)
    assert collect(store, grace_s=-60).attempts == 1


def test_gc_does_not_run_beside_a_driver(store: LatentStore) -> None:
    with LatentStore.open(store.url).writer(), pytest.raises(StoreError, match="another ctpipe command"):
        collect(store)
