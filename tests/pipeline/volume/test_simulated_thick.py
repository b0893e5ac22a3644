"""A simulated thick series is made when read: the stated averages of the thin one, plus noise, always the same."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pipeline.volume import SIMULATED_FLAG, Geometry, SimulatedThick, Volume

DRAWN = SimulatedThick("by hand", 3.0, (1.0, 4.0), (0, 3), ((0.25, 0.5, 0.25), (0.5, 0.5)), 0.0, 7)


def thin(size: int = 64) -> Volume:
    affine = ((0.0, 0.0, 0.8, 0.0), (0.0, 0.8, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    at = Geometry((6, size, size), affine, tuple(np.arange(6.0)), 1.0)
    return Volume(np.broadcast_to(100 * np.arange(6, dtype=np.int16)[:, None, None], at.shape_zyx).copy(), at)


def test_slices_are_the_stated_averages_at_the_stated_places() -> None:
    made = DRAWN.of(thin())
    assert made.hu[:, 0, 0].tolist() == [100, 350]
    assert made.geometry.z_mm == (1.0, 4.0)
    assert made.geometry.thickness_mm == 3.0
    assert made.geometry.slice_position(1) == pytest.approx((0.0, 0.0, 4.0))
    assert SIMULATED_FLAG in made.flags
    assert SimulatedThick.from_json(DRAWN.to_json()) == DRAWN


def test_noise_has_the_stated_strength_is_not_white_and_repeats() -> None:
    noisy = SimulatedThick(DRAWN.profile, 3.0, DRAWN.z_mm, DRAWN.first, DRAWN.weights, 6.0, 7)
    made = noisy.of(thin(256))
    noise = made.hu[0].astype(float) - 100
    assert noise.std() == pytest.approx(6.0, rel=0.05)
    assert np.mean(noise[:, 1:] * noise[:, :-1]) > 0.3 * noise.var()
    np.testing.assert_array_equal(made.hu, noisy.of(thin(256)).hu)
    assert not np.array_equal(noise, made.hu[1].astype(float) - 350)


def edge() -> Volume:
    one = thin()
    one.hu[:, :, 32:] += 400
    return one


@pytest.mark.parametrize(("pixels", "gain"), [(0.7, -1.0), (0.8, 0.5)])
def test_another_kernel_blurs_or_sharpens_edges_and_keeps_the_mean(pixels: float, gain: float) -> None:
    plain, made = DRAWN.of(edge()).hu, replace(DRAWN, kernel_pixels=pixels, kernel_gain=gain).of(edge()).hu
    assert made.mean() == pytest.approx(plain.mean(), abs=0.5)
    step, other = np.abs(np.diff(plain[0, 10].astype(float))).max(), np.abs(np.diff(made[0, 10].astype(float))).max()
    assert (other < 0.7 * step) if gain < 0 else (other > 1.2 * step)
    assert made[0, 10, 10] == plain[0, 10, 10]


def test_what_an_older_store_recorded_has_one_kernel() -> None:
    raw = json.loads(DRAWN.to_json())
    del raw["kernel_pixels"], raw["kernel_gain"]
    assert SimulatedThick.from_json(json.dumps(raw)) == DRAWN
