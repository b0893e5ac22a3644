"""Volumes of nodules and vessels from HU, as a reader's tool measures them, against volumes that are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

from latentcache import InputError
from pipeline.metrics.intensity import check
from pipeline.volume import Geometry

Point = tuple[float, float, float]
MARGIN_MM = 2.5
"""Distance from a structure's surface to the end of its region: half a thick slice, less than the next vessel."""


TRUTH_TOLERANCE = 0.25


@dataclass(frozen=True)
class Structure:
    """A nodule, or a stretch of vessel, whose volume is known.

    Attributes:
        start, end: Ends of its axis, (x, y, z) in LPS mm; the same point for a nodule.
        radius_mm: Largest distance of its surface from the axis.
        volume_mm3: Known volume; for a vessel that of the stretch between the planes through both ends.
        inside_hu, outside_hu: HU of the structure and of its surroundings.
    """

    kind: Literal["nodule", "vessel"]
    start: Point
    end: Point
    radius_mm: float
    volume_mm3: float
    inside_hu: float
    outside_hu: float


def volume_errors(hu: NDArray[Any], geometry: Geometry, structures: Sequence[Structure]) -> dict[str, dict[str, float]]:
    """By kind: ``count``, how many are ``missed``, and errors relative to the known volume.

    ``total_error`` is that of the summed volumes; ``mean_absolute_error`` weighs every structure alike. A structure of
    which no voxel passes the half level measures 0 mm^3: its error is -1, and it counts as missed.

    Args:
        hu: (z, y, x) HU on ``geometry``.
    """
    check(hu, hu)
    found: dict[str, list[tuple[float, float]]] = {}
    for one in structures:
        found.setdefault(one.kind, []).append((half_level_volume(hu, geometry, one), one.volume_mm3))
    out: dict[str, dict[str, float]] = {}
    for kind, rows in found.items():
        measured, known = np.array(rows).T
        out[kind] = {
            "count": float(len(rows)),
            "missed": float(np.count_nonzero(measured == 0)),
            "total_error": float(measured.sum() / known.sum() - 1),
            "mean_absolute_error": float(np.mean(np.abs(measured / known - 1))),
        }
    return out


def measurable(truth: NDArray[Any], geometry: Geometry, structures: Sequence[Structure]) -> tuple[Structure, ...]:
    """Structures that the true series (z, y, x) itself measures within ``TRUTH_TOLERANCE``.

    Where it does not (too few voxels, something touching that no list names), a method's error says nothing.
    """
    return tuple(
        s for s in structures if abs(half_level_volume(truth, geometry, s) / s.volume_mm3 - 1) <= TRUTH_TOLERANCE
    )


def half_level_volume(hu: NDArray[Any], geometry: Geometry, structure: Structure) -> float:
    """Volume in mm^3 of the voxels beyond the half level within the structure's own region.

    The region is the structure widened by ``MARGIN_MM``; a vessel's ends at the planes through its axis' ends, where
    the vessel goes on.
    """
    box = _box(geometry, structure)
    piece = hu[box].astype(np.float32)
    index = np.stack(np.meshgrid(*(np.arange(s.start, s.stop) for s in box), indexing="ij"), axis=-1)
    affine = geometry.affine
    points = index @ affine[:3, :3].T + affine[:3, 3]
    start, along = np.array(structure.start), np.subtract(structure.end, structure.start)
    length = float(np.linalg.norm(along))
    unit = along / length if length else np.zeros(3)
    t = (points - start) @ unit
    radial = np.linalg.norm(points - start - t[..., None] * unit, axis=-1)
    region = radial <= structure.radius_mm + MARGIN_MM
    if length:
        region &= (t >= 0) & (t < length)
    sign = 1.0 if structure.inside_hu > structure.outside_hu else -1.0
    beyond = sign * (piece - np.float32((structure.inside_hu + structure.outside_hu) / 2)) > 0
    return float(np.count_nonzero(beyond & region) * np.prod(geometry.spacing_mm_zyx))


def holds(geometry: Geometry, structure: Structure) -> bool:
    """Whether the structure's whole region is within the grid."""
    low, high = _bounds(geometry, structure)
    return bool((low >= 0).all() and (high < np.array(geometry.shape_zyx)).all())


def _bounds(geometry: Geometry, structure: Structure) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last voxel index (z, y, x) that the region can touch."""
    inverse = np.linalg.inv(geometry.affine)
    ends = np.array([[*structure.start, 1.0], [*structure.end, 1.0]]) @ inverse.T
    reach = (structure.radius_mm + MARGIN_MM) / np.array(geometry.spacing_mm_zyx)
    low, high = ends[:, :3].min(axis=0) - reach, ends[:, :3].max(axis=0) + reach
    return np.floor(low).astype(np.int64), np.ceil(high).astype(np.int64)


def _box(geometry: Geometry, structure: Structure) -> tuple[slice, ...]:
    low, high = _bounds(geometry, structure)
    limits = zip(low, high, geometry.shape_zyx, strict=True)
    return tuple(slice(max(0, int(a)), min(n, int(b) + 1)) for a, b, n in limits)


def threshold_volume(
    hu: NDArray[Any], voxel_mm3: float, seed_zyx: tuple[int, int, int], inside_hu: float, outside_hu: float
) -> float:
    """Volume in mm^3 of the region around ``seed_zyx`` beyond the half level, as a reader's tool measures it.

    Raises:
        InputError: The seed itself is on the outside's part of the half level: the structure is lost.
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
