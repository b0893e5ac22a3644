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


def test_calibrated_intervals_hold_nine_in_ten_of_other_patients_truths_at_every_spread() -> None:
    """Spreads that are too small by a factor of their own: the scale by bin makes up for it."""
    rng = np.random.default_rng(2)

    def errors(count: int) -> tuple[np.ndarray, np.ndarray]:
        spread = np.exp(rng.uniform(np.log(5), np.log(100), count))
        return rng.standard_t(5, count) * spread * np.where(spread > 30, 2.0, 1.2), spread

    intervals = Intervals.calibrated(*errors(40_000))
    error, spread = errors(40_000)
    assert 0.88 <= intervals.coverage(error, spread) <= 0.92
    for low, high in ((5, 20), (40, 100)):
        chosen = (spread > low) & (spread < high)
        assert 0.88 <= intervals.coverage(error[chosen], spread[chosen]) <= 0.92
    assert np.mean(np.abs(error) <= 1.645 * spread) < 0.8, "uncalibrated, they promise too much"
    with pytest.raises(InputError, match="voxels"):
        Intervals.calibrated(error[:50], spread[:50])
