from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusion.config import DataConfig
from diffusion.data import PairStream, make_store, widen
from diffusion.data.batches import BatchReader, fill_valid
from diffusion.data.epoch_plan import MicroBatch
from latentcache import NonFiniteError


def test_widening_is_exact_for_every_float16() -> None:
    every = np.arange(65_536, dtype=np.uint16).view(np.float16)
    wide = np.empty(every.shape, np.float32)
    widen(every, wide)
    expected = every.astype(np.float32)
    finite = np.isfinite(expected)
    assert np.array_equal(wide[finite].view(np.int32), expected[finite].view(np.int32))  # the sign of zero too
    assert (np.abs(wide[~finite]) >= 65_536).all()


def test_widening_reads_a_crop() -> None:
    whole = np.random.default_rng(0).standard_normal((2, 5, 9, 9)).astype(np.float16)
    crop = whole[:1, :, 2:6, 1:8]
    wide = np.empty(crop.shape, np.float32)
    widen(crop, wide)
    assert np.array_equal(wide, crop.astype(np.float32))


def test_padding_in_plane_is_masked() -> None:
    mask = np.full((1, 3, 16, 16), np.nan, np.float32)
    fill_valid(mask, (40, 60, 52))
    assert mask[:, :, :15, :13].min() == 1
    assert mask.sum() == 3 * 15 * 13
    fill_valid(mask[:, :, :4, :4], (40, 60, 52), row=13, column=12)
    assert mask[:, :, :4, :4].sum() == 3 * 2 * 1


def test_the_size_of_a_batch_is_known_before_it_is_read(tmp_path: Path) -> None:
    stream = PairStream(make_store(tmp_path / "s"), DataConfig(window=4, readers=0))
    reader: BatchReader = stream._batches
    micro = MicroBatch((0, 1), (1.0, 1.0))
    batch = reader.load(micro, 0)
    assert reader.size(micro) == sum(batch[name].nbytes for name in ("thin", "condition", "mask"))


@pytest.mark.parametrize("where", ["stored", "whitened"])
def test_what_is_not_finite_raises_with_the_series_key(tmp_path: Path, where: str) -> None:
    store = make_store(tmp_path / "s", splits=("train",))
    reader: BatchReader = PairStream(store, DataConfig(readers=0))._batches
    if where == "whitened":
        reader.std = np.zeros_like(reader.std)
    else:
        # The store refuses to write it; a reader that another program wrote for must not train on it either.
        read = store.read

        def damaged(*args: object, **named: object) -> object:
            found = read(*args, **named)  # type: ignore[arg-type]
            found[1, 0, 0, 0] = np.inf
            return found

        store.read = damaged  # type: ignore[method-assign, assignment]
        reader.store = store
    key = store.records(role="thin")[0].key
    with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match=key):
        reader.load(MicroBatch((0,), (1.0,)), 0)
