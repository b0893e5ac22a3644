"""Looking at latents: dask views, statistics, differences."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentcache import InputError, LatentStore, StoreError
from latentcache.dask_view import to_dask
from latentcache.maintenance import diff, summarise
from tests.latentcache.test_store import ENCODING, key, latent, series, stage

DEPTHS = (5, 3, 9)


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    made = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    made.register_encoding(ENCODING)
    made.append_catalog([series(0), series(1), series(2, "val")])
    with made.writer() as writer:
        writer.commit([stage(made, n, latent(d, seed=n)) for n, d in enumerate(DEPTHS)])
    return made


def test_a_split_is_one_lazy_array(store: LatentStore) -> None:
    view = to_dask(store, ENCODING.encode_key)
    assert view.array.shape == (4, 17, 8, 8)
    assert view.array.dtype == np.float16
    assert view.keys == (key(0), key(1), key(2))
    assert view.starts == (0, 5, 8, 17)
    whole = np.concatenate([latent(d, seed=n) for n, d in enumerate(DEPTHS)], axis=1)
    np.testing.assert_array_equal(view.array.compute(scheduler="synchronous"), whole)
    mean = view.array.astype(np.float64).mean(axis=(1, 2, 3)).compute(scheduler="synchronous")
    np.testing.assert_allclose(mean, whole.astype(np.float64).mean((1, 2, 3)), rtol=1e-12)
    val = to_dask(store, ENCODING.encode_key, split="val")
    np.testing.assert_array_equal(val.array.compute(scheduler="synchronous"), latent(9, seed=2))
    assert "dask.array" in sys.modules


def test_unlike_planes_make_no_array(store: LatentStore) -> None:
    with store.writer() as writer:
        writer.commit([stage(store, 3, latent(5, size=4))])
    with pytest.raises(InputError, match="2 different in-plane shapes"):
        to_dask(store, ENCODING.encode_key)
    with pytest.raises(InputError, match="0 latents"):
        to_dask(store, ENCODING.encode_key, role="thick_on_thin", split="train")


def test_statistics_of_known_latents(store: LatentStore) -> None:
    found = summarise(store, ENCODING.encode_key, "thin")
    whole = np.concatenate([latent(d, seed=n) for n, d in enumerate(DEPTHS)], axis=1).astype(np.float64)
    np.testing.assert_allclose(found.moments.mean, whole.mean((1, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.correlation, np.corrcoef(whole.reshape(4, -1)), atol=1e-12)
    assert found.histogram.sum(axis=1).tolist() == [17 * 64] * 4
    centre = found.histogram[:, 20:30].sum(axis=1) / (17 * 64)  # within one std
    np.testing.assert_allclose(centre, 0.683, atol=0.05)
    assert found.outliers == ()
    assert summarise(store, ENCODING.encode_key, "thin", sample=2).sampled == 2
    with pytest.raises(InputError, match="no thick latents"):
        summarise(store, ENCODING.encode_key, "thick")


def test_an_unlike_latent_is_named(store: LatentStore) -> None:
    rows = [stage(store, n, latent(4, seed=n)) for n in range(10, 30)]
    strange = latent(4, seed=99)
    strange[2] += np.float16(3)
    with store.writer() as writer:
        writer.commit([*rows, stage(store, 31, strange)])
    worst = summarise(store, ENCODING.encode_key, "thin").outliers[0]
    assert (worst.key, worst.figure, worst.channel) == (key(31), "mean", 2)
    assert worst.value == pytest.approx(3, abs=0.2)


def test_two_encodings_are_compared(store: LatentStore) -> None:
    other = replace(ENCODING, window_width=2000, vae_architecture={"channels": [8, 32]})
    store.register_encoding(other)
    moved = latent(3, seed=1)
    moved[:, 0] *= np.float16(1.5)
    with store.writer() as writer:
        writer.commit(
            [
                stage(store, 0, latent(5, seed=0), encode_key=other.encode_key),
                stage(store, 1, moved, encode_key=other.encode_key),
                stage(store, 2, latent(8), encode_key=other.encode_key),
                stage(store, 4, encode_key=other.encode_key),
            ]
        )
    found = diff(store, ENCODING.encode_key, other.encode_key)
    assert found.settings == {"vae_architecture.channels": ([8, 16], [8, 32]), "window_width": (400, 2000)}
    assert (found.only_a, found.only_b, found.common) == ((), ((key(4), "thin"),), 3)
    assert found.incomparable == ((key(2), "thin"),)
    worst, same = found.compared
    expected = (
        0.5 * np.linalg.norm(latent(3, seed=1)[:, 0].astype(float)) / np.linalg.norm(latent(3, seed=1).astype(float))
    )
    assert worst.key == key(1)
    assert worst.relative == pytest.approx(expected, rel=1e-2)
    assert (same.key, same.relative, same.identical_bytes) == (key(0), 0.0, True)
    assert len(diff(store, ENCODING.encode_key, other.encode_key, sample=1).compared) == 1
    with pytest.raises(InputError, match="twice"):
        diff(store, "a", "a")
    with pytest.raises(StoreError, match="no encoding"):
        diff(store, ENCODING.encode_key, "a" * 16)
