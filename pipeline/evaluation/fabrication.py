"""Tests of a fabrication alarm on planted nodules, and of whether intervals from samples hold what they promise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from latentcache import InputError
from pipeline.metrics import LEAST_SPREAD_HU


def auc(positive: NDArray[np.floating], negative: NDArray[np.floating]) -> float:
    """Area under the ROC curve: the share of pairs in which the positive scores higher, ties a half (Mann-Whitney).

    Raises:
        InputError: One of the two is empty, or holds NaN.
    """
    both = np.concatenate([np.asarray(positive, np.float64), np.asarray(negative, np.float64)])
    n, m = len(positive), len(negative)
    if not n or not m or np.isnan(both).any():
        raise InputError(f"{n} positive and {m} negative scores", expected="numbers of both kinds", remedy="None.")
    return float((rankdata(both)[:n].sum() - n * (n + 1) / 2) / (n * m))


@dataclass(frozen=True)
class Intervals:
    """Mean +- scale * spread, the scale by how large the spread is, calibrated on errors of other patients.

    Attributes:
        level: Share of truths that an interval is to hold.
        edges_hu: (B - 1,) spreads between the bins.
        scale: (B,)
    """

    level: float
    edges_hu: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def calibrated(
        cls, error_hu: NDArray[np.floating], spread_hu: NDArray[np.floating], level: float = 0.9, bins: int = 8
    ) -> Intervals:
        """From truth - mean and the samples' spread, of voxels of calibration patients (split conformal, a bin apart).

        Raises:
            InputError: Fewer than 100 voxels a bin.
        """
        error, spread = (np.asarray(v, np.float64).ravel() for v in (error_hu, spread_hu))
        if len(error) < 100 * bins:
            raise InputError(f"{len(error)} voxels", expected=f"{100 * bins} or more", remedy="Give more patients.")
        edges = np.quantile(spread, np.arange(1, bins) / bins)
        ratio = np.abs(error) / np.hypot(spread, LEAST_SPREAD_HU)
        own = np.digitize(spread, edges)
        # A bin can be empty where many spreads are equal: all voxels speak for it then.
        scale = [np.quantile(ratio[own == b] if np.any(own == b) else ratio, level) for b in range(bins)]
        return cls(level, edges, np.asarray(scale))

    def half_width(self, spread_hu: NDArray[np.floating]) -> NDArray[np.float64]:
        """HU to either side of the mean."""
        spread = np.asarray(spread_hu, np.float64)
        return np.asarray(self.scale[np.digitize(spread, self.edges_hu)] * np.hypot(spread, LEAST_SPREAD_HU))

    def coverage(self, error_hu: NDArray[np.floating], spread_hu: NDArray[np.floating]) -> float:
        """Share of truths within their interval."""
        return float(np.mean(np.abs(error_hu) <= self.half_width(spread_hu)))
