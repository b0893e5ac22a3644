"""The encode stage: where latents lie, and what the pixel proof does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from latentcache import LatentMeta, LatentRecord, PairRecord
from pipeline.encode import EncodeTask, task as encode
from pipeline.encode.task import Prepared, Wanted
from pipeline.volume import Geometry, Volume, Window


def volume(n: int, spacing: float, first: float, value: Any) -> Volume:
    affine = ((0.0, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.0), (spacing, 0.0, 0.0, first), (0.0, 0.0, 0.0, 1.0))
    z = tuple(first + spacing * np.arange(n))
    hu = np.broadcast_to(np.asarray(value(np.array(z)), dtype=np.float32)[:, None, None], (n, 8, 8))
    return Volume(hu.astype(np.int16), Geometry((n, 8, 8), affine, z, spacing))


class SliceMeans:
    """An encoder whose latents are the mean of four slices: what it saw can be read off."""

    sha256 = "0" * 64
    architecture: dict[str, Any] = {"kind": "mean of four"}  # noqa: RUF012

    def encode(self, unit: np.ndarray, *, pad_multiple_zyx: tuple[int, int, int]) -> np.ndarray:
        assert pad_multiple_zyx == (4, 32, 32)
        padded = np.pad(unit, ((0, -len(unit) % 4), (0, 24), (0, 24)), mode="edge")
        means = padded.mean(axis=(1, 2)).reshape(-1, 4).mean(axis=1)
        return np.broadcast_to(means[None, :, None, None], (4, len(means), 8, 8)).astype(np.float32)

    def decode(self, latent: np.ndarray, valid_zyx: tuple[int, int, int]) -> np.ndarray:
        slices = np.repeat(latent[0, :, 0, 0], 4)[: valid_zyx[0]]
        return np.broadcast_to(slices[:, None, None], valid_zyx)


class Shelf:
    """A store that remembers what was staged."""

    def __init__(self) -> None:
        self.staged: dict[tuple[str, str], tuple[np.ndarray, dict[str, Any]]] = {}

    def stage(self, array: np.ndarray, meta: LatentMeta) -> LatentRecord:
        facts = asdict(meta)
        self.staged[facts["key"], facts["role"]] = (array, facts)
        return LatentRecord(
            shape=array.shape, dtype="float16", path="x", crc32c=(), sha256="", mean=(), std=(), **facts
        )


def pair(**changes: Any) -> PairRecord:
    row = PairRecord("pp", "s", "p", "APE", "K", "N", (0.0, 20.0), "train", json.dumps({"score": 1}))
    return replace(row, **changes)


def prepared(roles: list[tuple[str, str]], proof: PairRecord | None = None) -> Prepared:
    task = EncodeTask("pp", "e" * 16, None, None, tuple(Wanted(k, r, "d") for k, r in roles), proof)  # type: ignore[arg-type]
    ramp = lambda z: 40 + z  # noqa: E731 - HU equal to the position, so that interpolation can be checked
    return Prepared(task, volume(21, 1.0, -4.0, ramp), volume(3, 5.0, 0.0, ramp))


def test_latents_lie_where_their_slices_lie() -> None:
    shelf = Shelf()
    work = prepared([("N", "thin"), ("K", "thick"), ("pp", "thick_on_thin")])
    encoded = encode.encode_one(SliceMeans(), Window(), shelf.stage, work)
    assert [r.role for r in encoded.records] == ["thin", "thick", "thick_on_thin"]
    thin, thick = shelf.staged["N", "thin"], shelf.staged["K", "thick"]
    assert (thin[1]["z0_mm"], thin[1]["dz_mm"]) == (-2.5, 4.0)
    assert (thick[1]["z0_mm"], thick[1]["dz_mm"]) == (7.5, 20.0)
    assert thin[0].shape == (4, 6, 8, 8)
    assert thin[0].dtype == np.float16
    # Slices -4..-1 of the ramp 40 + z average to 37.5 HU.
    assert thin[0][0, 0, 0, 0] == pytest.approx((37.5 - 40) / 200, abs=1e-3)
    on_thin, facts = shelf.staged["pp", "thick_on_thin"]
    assert facts["valid_zyx"] == (21, 8, 8)
    # Outside the thick series its end slices hold; inside, linear interpolation of a ramp is the ramp.
    assert on_thin[0, 0, 0, 0] == pytest.approx(0.0, abs=1e-3)
    assert on_thin[0, 2, 0, 0] == pytest.approx((45.5 - 40) / 200, abs=1e-3)


def test_a_pair_that_pixels_refuse_gets_no_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    import pipeline.pairing.candidates

    verdict = SimpleNamespace(ok=False, reason="thin does not average to thick", evidence={"rms_hu": 99.0})
    monkeypatch.setattr(pipeline.pairing, "prove_pair", lambda thick, thin: verdict, raising=False)
    work = prepared([("pp", "thick_on_thin"), ("N", "thin")], proof=pair())
    encoded = encode.encode_one(SliceMeans(), Window(), Shelf().stage, work)
    assert [r.role for r in encoded.records] == ["thin"]
    assert encoded.pair is not None
    assert encoded.pair.status == "quarantined"
    assert json.loads(encoded.pair.evidence) == {"score": 1, "pixel_proof": {"rms_hu": 99.0}}


def test_the_round_trip_is_measured_on_the_share_asked_for() -> None:
    full = encode.encode_one(SliceMeans(), Window(), Shelf().stage, prepared([("N", "thin")]), round_trip_fraction=1.0)
    none = encode.encode_one(SliceMeans(), Window(), Shelf().stage, prepared([("N", "thin")]), round_trip_fraction=0.0)
    assert none.records[0].round_trip_psnr is None
    # Four-slice means of a 1 HU/mm ramp miss by 1.5, 0.5, 0.5, 1.5 HU (the lone last slice by none) of 400 HU.
    mse = (5 * (2 * 1.5**2 + 2 * 0.5**2)) / 21
    assert full.records[0].round_trip_psnr == pytest.approx(20 * np.log10(400) - 10 * np.log10(mse), abs=0.05)
