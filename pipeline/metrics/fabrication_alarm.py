"""A fabrication alarm: where an answer holds what the other samples do not, or what the thick slices contradict.

A structure in ker A leaves A x as it was, so no residual shows it; the certificate cannot know of it. What can be known
is that the samples do not agree on it: an answer that differs from the other samples, in units of their own spread,
holds something that the thick slices do not determine. What every sample invents alike differs from nothing. No
alarm that sees thick slices and samples alone can find that (two volumes that differ by it have one thick series).

    alarm^2 = mean over 5 mm along z of (mean over 3 x 3 pixels of (x - m) / s)^2 + max(0, e - 1)^2

with m and s the other samples' mean and spread, and e the RMS of A x - y about a voxel over the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from latentcache import InputError
from pipeline.forward_model import ThickMeasurement

REACH_MM = 5.0
"""Along z: half of a nodule of 3 to 8 mm and of the ripple that its part in ker A leaves beside it."""
LEAST_SPREAD_HU = 2.0
"""Added in quadrature to the samples' spread: what rounding and interpolation differ by."""
Map = NDArray[np.float32]


@dataclass(frozen=True)
class OtherSamples:
    """Statistics of the samples beside the judged one: mean and standard deviation (z, y, x) HU, of so many."""

    mean: Map
    spread: Map
    count: int


def alarm_map(answer: NDArray[np.generic], others: OtherSamples, measured: ThickMeasurement) -> Map:
    """The alarm (z, y, x), without unit: about 0.5 or less where an answer is like the other samples.

    Raises:
        InputError: Fewer than two other samples, whose spread nobody knows.
    """
    if others.count < 2:
        raise InputError(
            f"{others.count} other samples", expected="two or more, to know their spread", remedy="Give --samples 4."
        )
    x = answer.astype(np.float32)
    # A variance from few samples is noisy: pooled over a voxel's neighbours, where spread is alike.
    variance = uniform_filter(np.square(others.spread), 3, mode="nearest") * np.float32(1 + 1 / others.count)
    apart = (x - others.mean) / np.sqrt(variance + np.float32(LEAST_SPREAD_HU**2))
    apart = np.square(uniform_filter(apart, (1, 3, 3), mode="nearest"))
    reach = max(1, round(REACH_MM / measured.spacing_mm))
    alarm = uniform_filter(apart, (reach, 1, 1), mode="nearest")
    alarm += np.square(np.maximum(residual_map(x, measured) - np.float32(1), 0))
    return np.asarray(np.sqrt(np.maximum(alarm, 0)), np.float32)


def residual_map(x: Map, measured: ThickMeasurement) -> Map:
    """RMS of A x - y over 3 x 3 pixels and the thick slices about a thin one, over the noise, (z, y, x); 0 beyond."""
    covered = measured.operator.covered
    a = measured.operator.matrix[covered].astype(np.float32)
    missed = (np.tensordot(a, x, 1) - np.asarray(measured.hu[covered], np.float32)) / np.float32(measured.noise_hu)
    squares = uniform_filter(np.square(missed), (1, 3, 3), mode="nearest")
    share = np.abs(a) / np.maximum(np.abs(a).sum(axis=0), np.float32(1e-6))
    return np.asarray(np.sqrt(np.maximum(np.tensordot(share.T, squares, 1), 0)), np.float32)


def score_at(alarm: Map, center_zyx: tuple[float, float, float], spacing_mm_zyx: tuple[float, float, float]) -> float:
    """The largest alarm within 4 mm of a place (voxels): what a reader who looks there is shown."""
    block = tuple(
        slice(max(0, round(c - 4 / d)), min(n, round(c + 4 / d) + 1))
        for c, d, n in zip(center_zyx, spacing_mm_zyx, alarm.shape, strict=True)
    )
    return float(alarm[block].max())
