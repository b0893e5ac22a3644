"""Latents as plain Zarr: equal to the store's own reads, read-only, checked, and without a copy."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

from latentcache import CorruptLatentError, InputError, LatentStore
from latentcache.shard import SHARD
from tests.latentcache.test_store import ENCODING, key, latent, series, stage


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    made = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    made.register_encoding(ENCODING)
    made.append_catalog([series(0), series(1), series(2, "val")])
    with made.writer() as writer:
        writer.commit([stage(made, n, latent(d, seed=n)) for n, d in enumerate((5, 3, 9))])
    return made


def test_a_latent_is_a_zarr_array(store: LatentStore) -> None:
    row = store.find(key(2), "thin")
    assert row is not None
    array = store.zarr_array(row)
    assert isinstance(array, zarr.Array)
    assert (array.shape, array.dtype, array.metadata.dimension_names) == (
        row.shape,
        np.float16,
        ("channel", "z", "y", "x"),
    )
    np.testing.assert_array_equal(array[...], latent(9, seed=2))
    np.testing.assert_array_equal(array[1:3, 2:7, 1], latent(9, seed=2)[1:3, 2:7, 1])
    assert array.attrs["z0_mm"] == row.z0_mm
    assert array.attrs["valid_zyx"] == list(row.valid_zyx)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(array))[...], array[...])


def test_a_split_is_a_zarr_group(store: LatentStore) -> None:
    group = store.zarr_group(ENCODING.encode_key)
    assert sorted(group.array_keys()) == [key(0), key(1), key(2)]
    assert group.metadata.consolidated_metadata is not None
    assert sorted(store.zarr_group(ENCODING.encode_key, split="val").array_keys()) == [key(2)]
    assert sorted(store.zarr_group(ENCODING.encode_key, "thick").array_keys()) == []
    np.testing.assert_array_equal(group[key(0)][:, -1], latent(5, seed=0)[:, -1])


def test_nothing_is_written_through_it(store: LatentStore) -> None:
    before = sorted(p.name for p in Path(store.url).rglob("*"))
    group = store.zarr_group(ENCODING.encode_key)
    with pytest.raises(ValueError, match=r"Zarr view|read.only"):
        group[key(0)][0] = 0
    with pytest.raises(ValueError, match=r"Zarr view|read.only"):
        group.create_array("new", shape=(1,), dtype="f2")
    assert sorted(p.name for p in Path(store.url).rglob("*")) == before


def test_missing_and_changed_bytes_are_errors_not_zeros(store: LatentStore) -> None:
    row = store.find(key(0), "thin")
    assert row is not None
    shard = Path(store.url) / row.path / SHARD
    whole = shard.read_bytes()
    # Another latent's shard of the same shape: every checksum inside it holds, the row's do not.
    other = stage(store, 7, latent(5, seed=77))
    shard.write_bytes((Path(store.url) / other.path / SHARD).read_bytes())
    with pytest.raises(CorruptLatentError, match=f"{key(0)} thin: its CRC-32C"):
        store.zarr_array(row)[...]
    shard.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ValueError, match="checksum"):
        store.zarr_array(row)[:, :2]
    shard.unlink()
    with pytest.raises(CorruptLatentError, match="missing"):
        store.zarr_array(row)[...]


def test_two_latents_of_one_key_make_no_group(store: LatentStore) -> None:
    from latentcache.zarr_view import open_group

    row = store.find(key(0), "thin")
    assert row is not None
    with pytest.raises(InputError, match="two latents of the key"):
        open_group(store.location, [row, row])


def test_without_zarr_the_error_names_the_extra(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    monkeypatch.delitem(sys.modules, "latentcache.zarr_view", raising=False)
    monkeypatch.delattr("latentcache.zarr_view", raising=False)
    with pytest.raises(InputError, match=r"ctpipe\[zarr\]"):
        store.zarr_group(ENCODING.encode_key)
