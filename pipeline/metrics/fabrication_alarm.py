"""A fabrication alarm: where an answer holds what the other samples do not, or what the thick slices contradict.

A structure in ker A leaves A x as it was, so no residual shows it; the certificate cannot know of it. What can be known
is that the samples do not agree on it: an answer that differs from the other samples, in units of their own spread,
holds something that the thick slices do not determine. What every sample invents alike differs from nothing. No
alarm that sees thick slices and samples alone can find that (two volumes that differ by it have one thick series).

    alarm^2 = (g * (N (x - m) / s))^2 + max(0, e - 1)^2

with m and s the other samples' mean and spread, N the projection on ker A, g a Gaussian as narrow as a small nodule,
scaled to leave white noise its variance, and e the RMS of A x - y about a voxel over the noise. It is a matched filter:
the inner product of N (x - m) with a nodule b is that of x - m with N b, the part of b that no thick slice shows, whose
sign turns along z; a mean over signless differences would forget which signs belong together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d, uniform_filter

from latentcache import InputError
from pipeline.forward_model import ThickMeasurement
from pipeline.metrics.null_space import null_part, null_projector

SIGMA_MM = 0.6
"""Of the Gaussian: a ball of 2.7 mm has this standard deviation along an axis. Wider ones found fewer nodules of 3 to 8
mm, whose part in ker A is at their upper and lower edges."""
LEAST_GAIN = np.float32(0.05)
"""A slice that the thick ones determine wholly holds nothing of ker A, whatever rounding says."""
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
    """The alarm (z, y, x), without unit: as a standard normal number's size where an answer is like the others.

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
    apart = null_part(x - others.mean, measured.operator) / np.sqrt(variance + np.float32(LEAST_SPREAD_HU**2))
    alarm = np.square(_matched(apart, measured))
    alarm += np.square(np.maximum(residual_map(x, measured) - np.float32(1), 0))
    return np.asarray(np.sqrt(alarm), np.float32)


def _matched(apart: Map, measured: ThickMeasurement) -> Map:
    """The Gaussian along every axis, scaled so that independent errors, projected on ker A, have a variance of one."""
    for axis, pixel_mm in enumerate(measured.volume.geometry.spacing_mm_zyx[1:], start=1):
        sigma = SIGMA_MM / pixel_mm
        impulse = np.zeros(2 * int(4 * sigma + 1) + 1)
        impulse[len(impulse) // 2] = 1
        gain = np.sqrt(np.square(gaussian_filter1d(impulse, sigma)).sum())
        apart = gaussian_filter1d(apart, sigma, axis=axis, mode="nearest") / np.float32(gain)
    # Along z, what is in ker A alternates, and the Gaussian leaves less of it than of independent voxels.
    projector, sigma = null_projector(measured.operator), SIGMA_MM / measured.spacing_mm
    before = np.diagonal(projector)
    after = np.square(gaussian_filter1d(projector, sigma, axis=0, mode="nearest")).sum(axis=1)
    gain_z = np.sqrt(np.maximum(after, 1e-12) / np.maximum(before, 1e-12)).astype(np.float32)
    smooth = gaussian_filter1d(apart, sigma, axis=0, mode="nearest")
    return np.asarray(smooth / np.maximum(gain_z, LEAST_GAIN)[:, None, None], np.float32)


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
