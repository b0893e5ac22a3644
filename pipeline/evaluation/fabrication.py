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


TISSUES_HU = (-700.0, -150.0, -50.0, 150.0)
"""Bounds between the kinds of tissue (lung, its walls, fat, soft tissue, bone) whose intervals are calibrated apart."""


@dataclass(frozen=True)
class Intervals:
    """Mean +- scale * spread, the scale by tissue and by how large the spread is, calibrated on other patients' errors.

    Tissue is that of the mean, which an answer has; the truth it has not.

    Attributes:
        level: Share of truths that an interval is to hold.
        edges_hu: (T, B - 1) spreads between the bins of each tissue.
        scale: (T, B)
    """

    level: float
    edges_hu: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def calibrated(
        cls,
        error_hu: NDArray[np.floating],
        spread_hu: NDArray[np.floating],
        mean_hu: NDArray[np.floating],
        level: float = 0.9,
        bins: int = 8,
    ) -> Intervals:
        """From truth - mean, the samples' spread and their mean, of voxels of calibration patients.

        Split conformal prediction in every group of tissue and spread (Mondrian; Vovk et al. 2005, section 4.5).

        Raises:
            InputError: Fewer than 100 voxels a bin.
        """
        error, spread, mean = (np.asarray(v, np.float64).ravel() for v in (error_hu, spread_hu, mean_hu))
        if len(error) < 100 * bins:
            raise InputError(f"{len(error)} voxels", expected=f"{100 * bins} or more", remedy="Give more patients.")
        ratio = np.abs(error) / np.hypot(spread, LEAST_SPREAD_HU)
        tissue = np.digitize(mean, TISSUES_HU)
        edges, scales = [], []
        for kind in range(len(TISSUES_HU) + 1):
            # A tissue of too few voxels takes the scale of all.
            own = tissue == kind if np.count_nonzero(tissue == kind) >= 100 * bins else np.ones(len(tissue), bool)
            between = np.quantile(spread[own], np.arange(1, bins) / bins)
            at = np.digitize(spread[own], between)
            r = ratio[own]
            # A bin can be empty where many spreads are equal: all voxels speak for it then.
            scales.append([np.quantile(r[at == b] if np.any(at == b) else r, level) for b in range(bins)])
            edges.append(between)
        return cls(level, np.asarray(edges), np.asarray(scales))

    def half_width(self, spread_hu: NDArray[np.floating], mean_hu: NDArray[np.floating]) -> NDArray[np.float64]:
        """HU to either side of the mean."""
        spread = np.asarray(spread_hu, np.float64)
        tissue = np.digitize(np.asarray(mean_hu), TISSUES_HU)
        scale = np.empty(spread.shape)
        for kind, (edges, own) in enumerate(zip(self.edges_hu, self.scale, strict=True)):
            here = tissue == kind
            scale[here] = own[np.digitize(spread[here], edges)]
        return np.asarray(scale * np.hypot(spread, LEAST_SPREAD_HU))

    def coverage(
        self, error_hu: NDArray[np.floating], spread_hu: NDArray[np.floating], mean_hu: NDArray[np.floating]
    ) -> float:
        """Share of truths within their interval."""
        return float(np.mean(np.abs(error_hu) <= self.half_width(spread_hu, mean_hu)))
