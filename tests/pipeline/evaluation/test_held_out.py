from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusion.data import key_of, make_store
from diffusion.data.synthetic_store import ENCODING
from latentcache import InputError
from pipeline.evaluation import HeldOutImages, held_out as validation, texture_of_pairs
from pipeline.volume import Geometry, Volume

AFFINE = ((0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))


@dataclass
class Decoder:
    """Decodes a latent to the unit volume that its mean over channels, clipped, looks like at voxel size."""

    sha256: str = ENCODING.vae_sha256

    def decode(self, latent: Any, valid_zyx: tuple[int, int, int]) -> Any:
        unit = np.clip(np.asarray(latent).mean(0), -1, 1).repeat(4, 0).repeat(4, 1).repeat(4, 2)
        return unit[: valid_zyx[0], : valid_zyx[1], : valid_zyx[2]]

    def encode(self, unit: Any, *, pad_multiple_zyx: tuple[int, int, int]) -> Any:
        raise AssertionError("validation never encodes")


class Private:
    def pointers(self, keys: list[str]) -> dict[str, str]:
        return {key: key for key in keys}


@pytest.fixture
def held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HeldOutImages:
    store = make_store(tmp_path / "s", splits=("train", "val", "val"), depths=(8,), side=16)
    rng = np.random.default_rng(0)
    z, zk = np.arange(32.0), np.arange(0, 32, 4.0) + 1.5

    def read(key: str) -> Volume:
        at = z if key.startswith("3") else zk
        slope = np.sin(at / 5)[:, None, None] * 150 + 40
        hu = (slope + rng.normal(0, 3, (len(at), 64, 64))).astype(np.int16)
        return Volume(hu, Geometry(hu.shape, AFFINE, tuple(at), 1.0))

    monkeypatch.setattr(validation, "read_series", read)
    return HeldOutImages(store, Private(), Decoder(), ENCODING.encode_key, count=1)  # type: ignore[arg-type]


def test_a_look_scores_the_model_beside_its_bounds(held_out: HeldOutImages) -> None:
    assert [held.pair.pair_key for held in held_out.pairs] == [key_of(7, 1)], "the held-out split alone, the first pair"
    figures = held_out.figures(lambda pair: np.zeros((4, 8, 16, 16)))
    assert set(figures) == {
        f"{f}{s}" for f in ("val_psnr_db", "val_ssim") for s in ("", "_linear", "_base", "_vae_ceiling")
    }
    held = held_out.pairs[0]
    composed = np.clip(held.start - held.condition + 40.0, -160, 240)
    expected = 10 * np.log10(400.0**2 / np.mean((held.truth - composed) ** 2))
    assert figures["val_psnr_db"] == pytest.approx(expected, abs=1e-3), (
        "a latent of zeros is the window's centre everywhere, and that is added to the start"
    )


def test_a_model_that_changes_nothing_scores_as_what_it_starts_from(held_out: HeldOutImages, tmp_path: Path) -> None:
    from latentcache import LatentStore

    store = LatentStore.open(tmp_path / "s")
    record = store.find(key_of(7, 1), "thick_on_thin")
    assert record is not None
    figures = held_out.figures(lambda pair: store.read(record))
    assert figures["val_psnr_db"] == pytest.approx(figures["val_psnr_db_base"], abs=1e-4), (
        "the autoencoder's own error cancels: a sample decoded alone would show nothing else"
    )
    assert figures["val_psnr_db"] > figures["val_psnr_db_vae_ceiling"] + 10


@pytest.mark.parametrize(("share", "gain"), [(0.5, 1.0), (1.0, 1.0), (2.0, 0.5), (-1.0, 0.0)])
def test_of_a_mean_as_much_is_taken_as_it_earns(held_out: HeldOutImages, share: float, gain: float) -> None:
    """A change of ``share`` times what is missing: too little is taken whole, too much in part, a wrong one not."""
    held = held_out.pairs[0]
    wanted = held.condition + share * (held.truth - held.start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "_decode", lambda latent, held: wanted)
        figures = held_out.figures(lambda pair: np.zeros(1), means=True)
        draws = held_out.figures(lambda pair: np.zeros(1))
    assert figures["val_change_gain"] == pytest.approx(gain, abs=1e-5)
    assert figures["val_psnr_db"] >= figures["val_psnr_db_base"] - 1e-3, "never worse than what it starts from"
    assert "val_change_gain" not in draws, "a draw errs more than a mean and is worth no less"


def test_another_vae_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", splits=("val",), depths=(8,), side=16)
    with pytest.raises(InputError, match="--vae"):
        HeldOutImages(store, Private(), Decoder("1" * 64), ENCODING.encode_key)  # type: ignore[arg-type]


def test_texture_is_of_training_pairs_and_one_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "s", splits=("train", "val", "train", "train"), depths=(8,), side=16)
    rng = np.random.default_rng(0)
    z, zk = np.arange(32.0), np.arange(0, 30, 5.0) + 3
    seen = []

    def read(key: str) -> Volume:
        seen.append(key)
        if key == key_of(3, 2):
            raise InputError("a zip without its directory", expected="a whole zip", remedy="Copy it again.")
        at = z if key.startswith("3") else zk
        # The held-out patient, key 1, has ten times the noise.
        hu = (40 + rng.normal(0, 90 if key == key_of(3, 1) else 9, (len(at), 64, 64))).astype(np.int16)
        return Volume(hu, Geometry(hu.shape, AFFINE, tuple(at), 5.0 if at is zk else 1.0))

    monkeypatch.setattr(validation, "read_series", read)
    found, failed = texture_of_pairs(store, Private(), ENCODING.encode_key, count=3)  # type: ignore[arg-type]
    assert set(failed) == {key_of(7, 2)}
    assert "a zip without its directory" in failed[key_of(7, 2)]
    assert not {key_of(3, 1), key_of(4, 1)} & set(seen)
    assert found is not None
    (tissue,) = np.flatnonzero(found.voxels > 2000)
    # Four fifths of 81 HU^2 are in ker A, and the finest band of the slice has less than all of that.
    assert 25 < found.power[tissue].sum() < 0.8 * 81
    nothing, _ = texture_of_pairs(store, Private(), ENCODING.encode_key, count=0)  # type: ignore[arg-type]
    assert nothing is None
