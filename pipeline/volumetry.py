"""Volumes of nodules and vessels from HU, with partial volumes counted, for phantoms whose truth is known."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

from latentcache.errors import InputError
from pipeline.metrics import check


def threshold_volume(
    hu: NDArray[Any], voxel_mm3: float, seed_zyx: tuple[int, int, int], inside_hu: float, outside_hu: float
) -> float:
    """Volume in mm^3 of the region around ``seed_zyx`` beyond the half level, as a reader's tool measures it.

    Raises:
        InputError: The seed itself lies on the outside's part of the half level: the structure is lost.
    """
    check(hu, hu)
    sign = 1.0 if inside_hu > outside_hu else -1.0
    beyond = sign * (hu.astype(np.float32) - np.float32((inside_hu + outside_hu) / 2)) > 0
    if not beyond[seed_zyx]:
        raise InputError(
            "a structure whose centre does not reach half its contrast",
            expected="a visible structure",
            remedy="Count it as missed.",
        )
    regions, _ = label(beyond)
    return float(np.count_nonzero(regions == regions[seed_zyx]) * voxel_mm3)


def integrated_volume(hu: NDArray[Any], voxel_mm3: float, inside_hu: float, outside_hu: float) -> float:
    """Volume in mm^3 by conservation of contrast: sum of (HU - outside) / (inside - outside) over a box.

    Exact for any blur that keeps the mean and stays within the box, which must hold one structure only.
    """
    check(hu, hu)
    return float(np.sum((hu.astype(np.float64) - outside_hu) / (inside_hu - outside_hu)) * voxel_mm3)


def ball(
    shape_zyx: tuple[int, int, int],
    spacing_mm_zyx: tuple[float, float, float],
    center_mm: tuple[float, float, float],
    radius_mm: float,
    oversample: int = 5,
) -> NDArray[np.float64]:
    """Share of each voxel inside a ball, (z, y, x), ``oversample``^3 points a voxel; voxel 0 is centred at 0 mm."""
    return _covered(shape_zyx, spacing_mm_zyx, oversample, lambda z, y, x: _squared(z, y, x, center_mm) <= radius_mm**2)


def tube(
    shape_zyx: tuple[int, int, int],
    spacing_mm_zyx: tuple[float, float, float],
    center_mm: tuple[float, float, float],
    radius_mm: float,
    length_mm: float,
    axis: int = 2,
    oversample: int = 5,
) -> NDArray[np.float64]:
    """Share of each voxel inside a cylinder along ``axis`` (0 z, 1 y, 2 x): a stretch of vessel."""

    def inside(*points: NDArray[np.float64]) -> NDArray[np.bool_]:
        d = [p - c for p, c in zip(points, center_mm, strict=True)]
        along = d.pop(axis)
        return np.asarray((d[0] ** 2 + d[1] ** 2 <= radius_mm**2) & (np.abs(along) <= length_mm / 2))

    return _covered(shape_zyx, spacing_mm_zyx, oversample, inside)


def _squared(
    z: NDArray[np.float64], y: NDArray[np.float64], x: NDArray[np.float64], center: tuple[float, float, float]
) -> NDArray[np.float64]:
    return np.asarray((z - center[0]) ** 2 + (y - center[1]) ** 2 + (x - center[2]) ** 2)


def _covered(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], oversample: int, inside: Any
) -> NDArray[np.float64]:
    offsets = (np.arange(oversample) + 0.5) / oversample - 0.5
    axes = [((np.arange(n)[:, None] + offsets[None, :]) * s).ravel() for n, s in zip(shape, spacing, strict=True)]
    share = np.zeros(shape)
    for k in range(shape[0]):
        z = axes[0][k * oversample : (k + 1) * oversample]
        points = inside(z[:, None, None], axes[1][None, :, None], axes[2][None, None, :])
        points = np.broadcast_to(points, (oversample, len(axes[1]), len(axes[2])))
        share[k] = points.reshape(oversample, shape[1], oversample, shape[2], oversample).mean(axis=(0, 2, 4))
    return share
