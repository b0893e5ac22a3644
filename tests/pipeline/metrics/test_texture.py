"""Texture in ker A: what is measured is noise, and what is drawn brings a smooth answer to it and changes no A x."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.forward_model import SliceOperator, ThickMeasurement
from pipeline.metrics import DetailPower, Texture, TexturePower, drawn_texture, enlarged_detail, lacking, null_part
from pipeline.metrics.texture import BANDS, KINDS, MOST_GAIN, TISSUES
from pipeline.volume import Geometry, Volume

FAT, SOFT = 2, 3


def operator(n: int = 40) -> SliceOperator:
    return measured(np.zeros((n // 5, 4, 4), np.int16)).operator


def measured(thick: NDArray[np.int16]) -> ThickMeasurement:
    n = len(thick)
    affine = ((0.0, 0.0, 2.0, 0.0), (0.0, 2.0, 0.0, 0.0), (5.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    geometry = Geometry((n, *thick.shape[1:]), affine, tuple(5.0 * np.arange(n)), 5.0)
    return ThickMeasurement.of(Volume(thick, geometry), np.arange(-2.0, 5.0 * n - 2.0))


def two_tissues(noise: tuple[float, float], seed: int, n: int = 40) -> NDArray[np.float32]:
    """Fat beside soft tissue, with as much noise each."""
    hu = np.full((n, 72, 96), -90.0, np.float32)
    hu[:, :, 48:] = 40
    strength = np.where(np.arange(96) < 48, *noise).astype(np.float32)
    return hu + strength * np.random.default_rng(seed).standard_normal(hu.shape, np.float32)


def test_noise_is_brought_to_the_power_wanted_in_every_tissue_and_stays_in_ker_a() -> None:
    a = operator()
    wanted = TexturePower.of(two_tissues((8.0, 20.0), 0), a)
    plain = two_tissues((0.0, 0.0), 1)
    amplitudes = lacking(wanted, TexturePower.of(plain, a), a)
    assert not amplitudes[[0, 1, 4]].any(), "tissues that nobody has seen"
    out = plain.copy()
    for rows, noise in drawn_texture(plain, amplitudes, a, seed=7):
        assert np.abs(a.matrix @ noise.reshape(len(noise), -1)).max() < 1e-3 * np.abs(noise).max()
        out[:, rows] += noise
    found = TexturePower.of(out, a)
    assert found.power[[FAT, SOFT]] == pytest.approx(wanted.power[[FAT, SOFT]], rel=0.1)


def test_noise_that_is_there_counts() -> None:
    a = operator()
    wanted = TexturePower.of(two_tissues((10.0, 10.0), 0), a)
    enough = lacking(wanted, TexturePower.of(two_tissues((10.5, 10.5), 1), a), a)
    assert enough.max() < 1.0
    part = two_tissues((7.0, 7.0), 1)
    amplitudes = lacking(wanted, TexturePower.of(part, a), a)
    for rows, noise in drawn_texture(part, amplitudes, a, seed=7):
        part[:, rows] += noise
    found = TexturePower.of(part, a)
    assert found.power[[FAT, SOFT]] == pytest.approx(wanted.power[[FAT, SOFT]], rel=0.1)


def test_the_same_noise_however_the_rows_are_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    a, plain = operator(), two_tissues((0.0, 0.0), 1)
    amplitudes = np.full((TISSUES, BANDS), 5.0)

    def drawn() -> NDArray[np.float32]:
        return np.concatenate([part for _, part in drawn_texture(plain, amplitudes, a, 3)], axis=1)

    monkeypatch.setattr("pipeline.volume.resample.ROW_BLOCK", 72)
    whole = drawn()
    monkeypatch.setattr("pipeline.volume.resample.ROW_BLOCK", 16)
    np.testing.assert_allclose(drawn(), whole, atol=1e-4)


def test_borders_and_slices_beyond_the_thick_ones_are_not_noise() -> None:
    a, plain = operator(), two_tissues((0.0, 0.0), 1)
    plain[:, ::6, 60] += 500  # rods along the slices' borders
    plain[12:14, 20:40, 20:40] = 300
    assert TexturePower.of(plain, a).power[[FAT, SOFT]].max() < 1.0
    far = ThickMeasurement.of(measured(np.zeros((8, 4, 4), np.int16)).volume, np.arange(-20.0, 60.0)).operator
    slanted = np.repeat(two_tissues((0.0, 0.0), 1, 80)[:, :, :1], 96, axis=2) + np.arange(80)[:, None, None] * 3.0
    slanted[:, :, ::2] += 2
    inner = TexturePower.of(slanted, far)
    assert inner.voxels.sum() < slanted.size * 0.55, "40 of 80 slices are measured"


def test_it_is_kept_as_json_and_a_damaged_one_is_refused() -> None:
    noise = TexturePower.of(two_tissues((8.0, 20.0), 0), operator())
    one = Texture(noise, np.full((KINDS, BANDS), 1.25))
    again = Texture.from_json(one.to_json())
    np.testing.assert_allclose(again.noise.power, noise.power, atol=1e-4)
    np.testing.assert_array_equal(again.noise.voxels, noise.voxels)
    np.testing.assert_array_equal(again.gain, one.gain)
    both = noise + again.noise
    np.testing.assert_allclose(both.power, noise.power, atol=1e-4)
    assert both.voxels.sum() == 2 * noise.voxels.sum()
    damaged = [one.to_json().replace("[[0.0", "[[-1.0", 1), one.to_json().replace("1.25", "NaN", 1)]
    for text in ("", "{}", '{"power": [[1, 2]], "voxels": [3], "detail_gain": [[1, 1]]}', *damaged):
        with pytest.raises(InputError, match="texture that is damaged"):
            Texture.from_json(text)


def wavy(share: float, n: int = 40) -> NDArray[np.float32]:
    """Steps along z of unlike height, whose part in ker A has so much of its size."""
    steps = np.repeat(np.random.default_rng(3).normal(0, 400, (n // 4, 64, 64)), 4, axis=0).astype(np.float32)
    return steps + np.float32(share - 1) * null_part(steps, operator(n))


def test_detail_is_enlarged_by_what_draws_lack_of_it_and_stays_in_ker_a() -> None:
    a = operator()
    truth, draw = wavy(1.0), wavy(0.8)
    texture = Texture.of_noise(TexturePower.of(truth, a)).with_detail(DetailPower.of(truth, a), DetailPower.of(draw, a))
    assert texture.gain[0] == pytest.approx([1, 1]), "flat places get noise alone"
    # A draw with less detail is less steep, so that its places are not quite the same.
    assert texture.gain[-1] == pytest.approx([1.25, 1.25], rel=0.06)
    out = draw.copy()
    for rows, more in enlarged_detail(draw, texture.gain, a):
        assert np.abs(a.matrix @ more.reshape(len(more), -1)).max() < 1e-3 * np.abs(more).max()
        out[:, rows] += more
    assert np.abs(out - truth).mean() < 0.3 * np.abs(draw - truth).mean()
    assert (Texture.of_noise(texture.noise).gain == 1).all()
    assert not list(enlarged_detail(draw, np.ones((KINDS, BANDS)), a))


def test_a_gain_stays_within_bounds_and_needs_voxels() -> None:
    a = operator()
    truth, nothing = DetailPower.of(wavy(1.0), a), DetailPower.of(wavy(0.1), a)
    noise = TexturePower.of(wavy(1.0), a)
    assert Texture.of_noise(noise).with_detail(truth, nothing).gain.max() == MOST_GAIN
    assert (Texture.of_noise(noise).with_detail(nothing, truth).gain == 1).all(), "a draw is never blurred"
    few = DetailPower(truth.power, np.full(KINDS, 5))
    assert (Texture.of_noise(noise).with_detail(truth, few).gain == 1).all()
