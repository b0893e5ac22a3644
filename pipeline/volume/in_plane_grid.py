"""In-plane grids of two series: whether they are one, whether one is within the other, and the way between them.

Reconstructions of one acquisition may differ in their field of view. Their pixels then meet only by physical position:
the thick series is sampled at the thin one's pixel centres, slice by slice, at the thick heights. What is outside of
the measured field is nothing to compare with or to learn from, so that the thin field must lie within the thick one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from latentcache import InputError
from pipeline.volume.geometry import Geometry
from pipeline.volume.volume import Volume


def common_slices(thick: Geometry, thin: Geometry) -> slice:
    """Thin slices whose centres lie inside the thick series' scanned extent.

    Raises:
        InputError: When there are fewer than two.
    """
    low, high = thick.extent_mm
    inside = np.flatnonzero((np.array(thin.z_mm) >= low) & (np.array(thin.z_mm) <= high))
    if len(inside) < 2:
        raise InputError(
            f"{len(inside)} thin slices inside the thick extent", expected="at least 2", remedy="Exclude this pair."
        )
    return slice(int(inside[0]), int(inside[-1]) + 1)


MAX_GRID_OFFSET_PIXELS = 0.25
MAX_PIXEL_SPACING_ERROR = 1e-3
ROUNDING_PIXELS = 0.02
"""By which positions, rounded as decimal strings, may seem to lie outside."""
RESAMPLED_FLAG = "resampled-in-plane"


def grid_difference(one: Geometry, other: Geometry) -> str:
    """Return the difference of the in-plane grids, or an empty string where pixel (y, x) is the same place in both."""
    if one.shape_zyx[1:] != other.shape_zyx[1:]:
        return "another in-plane matrix"
    ratio = np.array(one.spacing_mm_zyx[1:]) / np.array(other.spacing_mm_zyx[1:])
    if np.any(np.abs(ratio - 1) > MAX_PIXEL_SPACING_ERROR):
        return "another pixel spacing"
    offset = grid_offset_pixels(one, other)
    return f"in-plane grids are {offset:.2f} pixels apart" if offset > MAX_GRID_OFFSET_PIXELS else ""


def grid_offset_pixels(one: Geometry, other: Geometry) -> float:
    """Distance between the first pixels of both grids in the middle of the common extent, in pixels of ``one``.

    Both grids are followed along their own (under gantry tilt sheared) slice step.
    """
    z_mm = sum(_common_extent(one, other)) / 2
    gap = _corner(other, z_mm) - _corner(one, z_mm)
    return max(abs(float(gap @ a)) / float(a @ a) for a in (one.affine[:3, 1], one.affine[:3, 2]))


def beyond_mm(field: Geometry, measured: Geometry) -> float:
    """Return how far ``field``'s pixel centres reach outside of ``measured``'s pixels (0 where they do not)."""
    rows, columns = field.shape_zyx[1] - 1, field.shape_zyx[2] - 1
    matrix, worst = _index_matrix(field, measured), 0.0
    size = np.array(measured.shape_zyx[1:])
    for z_mm in _common_extent(field, measured):
        start = _index_of(_corner(field, z_mm), measured, z_mm)
        for corner in product((0, rows), (0, columns)):
            index = start + matrix @ np.array(corner)
            outside = np.maximum(-0.5 - index, index - (size - 0.5))
            outside[outside < ROUNDING_PIXELS] = 0.0
            worst = max(worst, float((outside * measured.spacing_mm_zyx[1:]).max()))
    return worst


def onto_field(volume: Volume, field: Geometry) -> Volume:
    """The slices of a volume, at their own heights, sampled at the in-plane pixel centres of ``field``.

    Linear interpolation; where the new pixels are the larger ones, after a blur to their size, so that nothing aliases.
    Within the outer half pixel the edge value holds.

    Returns:
        The volume itself where the grids are one, else a float32 one that is flagged ``resampled-in-plane``.

    Raises:
        InputError: ``field`` reaches outside of what was measured.
    """
    own = volume.geometry
    if not grid_difference(own, field):
        return volume
    outside = beyond_mm(field, own)
    if outside > 0:
        raise InputError(
            f"a field of view that reaches {outside:.1f} mm beyond the measured one",
            expected="one that lies within it",
            remedy="Pair it with a series that covers it.",
        )
    matrix = _index_matrix(field, own)
    # A pixel of width w is a box of variance w^2 / 12: widen the measured one to the wanted one.
    ratio = np.array(field.spacing_mm_zyx[1:]) / np.array(own.spacing_mm_zyx[1:])
    sigma = np.sqrt(np.maximum(ratio**2 - 1, 0) / 12)
    shape = field.shape_zyx[1:]
    hu = np.empty((len(volume.hu), *shape), np.float32)
    for k, z_mm in enumerate(own.z_mm):
        image = volume.hu[k].astype(np.float32)
        if sigma.any():
            image = ndimage.gaussian_filter(image, sigma, mode="nearest")
        start = _index_of(_corner(field, z_mm), own, z_mm)
        ndimage.affine_transform(image, matrix, start, shape, output=hu[k], order=1, mode="nearest")
    geometry = field.with_z(list(own.z_mm), own.thickness_mm)
    return replace(volume, hu=hu, geometry=geometry, flags=(*volume.flags, RESAMPLED_FLAG))


def _common_extent(one: Geometry, other: Geometry) -> tuple[float, float]:
    """Lower and upper end in mm; the wrong way round where there is no overlap, which is for others to judge."""
    return max(one.extent_mm[0], other.extent_mm[0]), min(one.extent_mm[1], other.extent_mm[1])


def _corner(geometry: Geometry, z_mm: float) -> NDArray[np.float64]:
    """Return the first pixel's place at a height, in LPS mm."""
    step = geometry.affine[:3, 0]
    along = float(step @ geometry.normal)
    return np.asarray(geometry.affine[:3, 3] + (z_mm - geometry.z_mm[0]) / along * step)


def _index_matrix(field: Geometry, measured: Geometry) -> NDArray[np.float64]:
    """(2, 2): steps of one row and one column of ``field`` in rows and columns of ``measured``."""
    steps = [measured.affine[:3, axis] for axis in (1, 2)]
    return np.array([[float(field.affine[:3, axis] @ s) / float(s @ s) for axis in (1, 2)] for s in steps])


def _index_of(point: NDArray[Any], measured: Geometry, z_mm: float) -> NDArray[np.float64]:
    """Row and column of a point in the plane of ``measured`` at a height."""
    gap = point - _corner(measured, z_mm)
    return np.array([float(gap @ s) / float(s @ s) for s in (measured.affine[:3, 1], measured.affine[:3, 2])])
