"""Noise power against Parseval and white noise; restlessness along z against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from latentcache import InputError
from pipeline.metrics import noise_texture, slice_inconsistency
from pipeline.metrics.noise import noise_power_spectrum


def test_noise_power_integrates_to_the_variance() -> None:
    regions = np.random.default_rng(0).normal(40, 12, (50, 16, 16))
    power = noise_power_spectrum(regions, (0.7, 0.6))
    step = 1 / (16 * 0.7) / (16 * 0.6)
    assert power.sum() * step == pytest.approx(regions.var(axis=(1, 2)).mean(), rel=1e-9)


def test_white_noise_has_flat_power() -> None:
    regions = np.random.default_rng(1).normal(0, 10, (4000, 16, 16))
    power = noise_power_spectrum(regions, (0.5, 0.5))
    # The mean is taken out of every region, so frequency 0 holds nothing; the rest scatters by 1/sqrt(4000).
    assert power[0, 0] == pytest.approx(0, abs=1e-9)
    assert power.ravel()[1:] == pytest.approx(np.full(255, 10**2 * 0.25), rel=0.1)


def test_noise_texture_sees_less_and_lower_noise_after_smoothing() -> None:
    rng = np.random.default_rng(2)
    truth = 40 + rng.normal(0, 15, (12, 64, 64))
    smooth = (truth + np.roll(truth, 1, 1) + np.roll(truth, 1, 2) + np.roll(truth, (1, 1), (1, 2))) / 4
    found = noise_texture(smooth, truth, (0.7, 0.7))
    assert found["truth"]["std_hu"] == pytest.approx(15, rel=0.05)
    assert found["prediction"]["std_hu"] == pytest.approx(7.5, rel=0.1)
    assert found["prediction"]["mean_frequency_per_mm"] < 0.8 * found["truth"]["mean_frequency_per_mm"]


def test_a_volume_without_even_soft_tissue_is_said() -> None:
    air = np.full((6, 64, 64), -1000.0)
    for volume in (air, np.where(np.arange(64) < 32, -300.0, 300.0) * np.ones_like(air)):
        with pytest.raises(InputError, match="0 even regions"):
            noise_texture(volume, volume, (1, 1))


@pytest.mark.parametrize("pixel_mm", [2.0, 0.7])
def test_a_second_scan_has_the_noise_of_the_first(pixel_mm: float) -> None:
    """Regions chosen for the first scan's own noise would be those where it happens to have little."""
    rng = np.random.default_rng(5)
    wave = np.sin(np.arange(96) * pixel_mm / 9)
    anatomy = 40 + 25 * wave[:, None] * wave
    first, second = (anatomy + rng.normal(0, 14, (24, 96, 96)) for _ in range(2))
    assert noise_texture(second, first, (pixel_mm, pixel_mm))["ratio"]["std_hu"] == pytest.approx(1, abs=0.02)


def test_jitter_is_the_spread_of_independent_offsets_and_ignores_a_slope() -> None:
    rng = np.random.default_rng(3)
    truth = rng.normal(0, 50, (4000, 2, 2))
    slope = np.arange(4000)[:, None, None] * 0.3 + 7
    assert slice_inconsistency(truth + slope, truth)["jitter_hu"] == pytest.approx(0, abs=1e-9)
    jumping = truth + slope + rng.normal(0, 5, (4000, 1, 1))
    assert slice_inconsistency(jumping, truth)["jitter_hu"] == pytest.approx(5, rel=0.05)


def test_roughness_is_one_for_the_truth_and_less_for_a_blurred_volume() -> None:
    truth = np.random.default_rng(4).normal(0, 50, (30, 8, 8))
    assert slice_inconsistency(truth, truth)["roughness_ratio"] == pytest.approx(1)
    blurred = (truth + np.roll(truth, 1, 0)) / 2
    assert slice_inconsistency(blurred, truth)["roughness_ratio"] < 0.8
    assert np.isnan(slice_inconsistency(truth, np.zeros_like(truth))["roughness_ratio"])
