"""AUC, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from latentcache import InputError
from pipeline.evaluation import Intervals, auc


def test_auc_is_the_share_of_pairs_in_order_and_a_half_for_ties() -> None:
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert auc(np.array([1.0]), np.array([1.0])) == 0.5
    assert auc(np.array([1.0, 3.0]), np.array([2.0, 0.0])) == 0.75
    rng = np.random.default_rng(1)
    apart = auc(rng.normal(1, 1, 4000), rng.normal(0, 1, 4000))
    assert apart == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.015)
    with pytest.raises(InputError):
        auc(np.array([]), np.array([1.0]))
    with pytest.raises(InputError):
        auc(np.array([np.nan]), np.array([1.0]))


def drawn(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Error, spread and mean of voxels: spreads too small by a factor of their own, by three more in bone."""
    spread = np.exp(rng.uniform(np.log(5), np.log(100), count))
    mean = rng.choice([-850.0, -100.0, 40.0, 600.0], count, p=[0.3, 0.2, 0.45, 0.05])
    wrong = np.where(spread > 30, 2.0, 1.2) * np.where(mean > 300, 3.0, 1.0)
    return rng.standard_t(5, count) * spread * wrong, spread, mean


def test_calibrated_intervals_hold_nine_in_ten_of_other_patients_truths_at_every_spread() -> None:
    rng = np.random.default_rng(2)
    intervals = Intervals.calibrated(*drawn(rng, 80_000))
    error, spread, mean = drawn(rng, 80_000)
    assert 0.88 <= intervals.coverage(error, spread, mean) <= 0.92
    for low, high in ((5, 20), (40, 100)):
        chosen = (spread > low) & (spread < high)
        assert 0.88 <= intervals.coverage(error[chosen], spread[chosen], mean[chosen]) <= 0.92
    assert np.mean(np.abs(error) <= 1.645 * spread) < 0.8, "uncalibrated, they promise too much"
    with pytest.raises(InputError, match="voxels"):
        Intervals.calibrated(error[:50], spread[:50], mean[:50])


def test_a_tissue_of_few_voxels_has_intervals_of_its_own() -> None:
    """Calibrated on all voxels together, bone's held 0.65 of its truths."""
    rng = np.random.default_rng(3)
    intervals = Intervals.calibrated(*drawn(rng, 80_000))
    error, spread, mean = drawn(rng, 80_000)
    for hu in (-850.0, -100.0, 40.0, 600.0):
        chosen = mean == hu
        assert 0.87 <= intervals.coverage(error[chosen], spread[chosen], mean[chosen]) <= 0.93
