"""Places of voxels. Axis order is zyx everywhere, lengths are millimetres, patient space is DICOM's LPS."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import SeriesRecord


def geometry_of(series: SeriesRecord) -> Geometry:
    """The grid that a catalog row describes."""
    a = series.affine_lps
    rows = tuple(tuple(a[4 * i : 4 * i + 4]) for i in range(4))
    return Geometry(series.shape_zyx, rows, series.z_mm, series.thickness_mm)


@dataclass(frozen=True)
class Geometry:
    """The grid of a series.

    Attributes:
        shape_zyx: Voxels along depth, rows, columns.
        affine_lps: (4, 4) float64; maps homogeneous indices (z, y, x, 1) to LPS millimetres (x, y, z, 1).
            Column 0 is the mean step from slice to slice (sheared under gantry tilt), column 1 the step from row to
            row, column 2 the step from column to column (DICOM PS3.3 C.7.6.2.1.1).
        z_mm: Projection of every slice's ImagePositionPatient on the slice normal, ascending.
        thickness_mm: SliceThickness as the scanner states it; spacing comes from positions instead.
    """

    shape_zyx: tuple[int, int, int]
    affine_lps: tuple[tuple[float, ...], ...]
    z_mm: tuple[float, ...]
    thickness_mm: float

    @property
    def affine(self) -> NDArray[np.float64]:
        return np.asarray(self.affine_lps, dtype=np.float64)

    @property
    def normal(self) -> NDArray[np.float64]:
        """Unit slice normal: cross product of the row and column directions (rows run along +x index)."""
        column_step, row_step = self.affine[:3, 1], self.affine[:3, 2]
        normal = np.cross(row_step, column_step)
        return np.asarray(normal / np.linalg.norm(normal))

    @property
    def spacing_mm_zyx(self) -> tuple[float, float, float]:
        """Mean distance along the slice normal, then between rows, then between columns."""
        a = self.affine
        dz = float(np.mean(np.diff(self.z_mm))) if len(self.z_mm) > 1 else float(self.thickness_mm)
        return (dz, float(np.linalg.norm(a[:3, 1])), float(np.linalg.norm(a[:3, 2])))

    @property
    def extent_mm(self) -> tuple[float, float]:
        """Lower and upper face of the scanned range: first and last position -/+ half the spacing."""
        half = self.spacing_mm_zyx[0] / 2
        return (self.z_mm[0] - half, self.z_mm[-1] + half)

    def slice_position(self, index: int) -> tuple[float, float, float]:
        """ImagePositionPatient of a slice, in LPS millimetres, exact for variable spacing too.

        Moves from slice 0 along the (possibly sheared) mean step, scaled by the true distance along the normal.
        """
        a = self.affine
        mean_step = a[:3, 0]
        along = float(mean_step @ self.normal)
        t = (self.z_mm[index] - self.z_mm[0]) / along if along else 0.0
        x, y, z = a[:3, 3] + t * mean_step
        return (float(x), float(y), float(z))

    def with_z(self, z_mm: NDArray[Any] | list[float], thickness_mm: float | None = None) -> Geometry:
        """The same field of view sampled at other, equally spaced positions along the normal."""
        z = np.asarray(z_mm, dtype=np.float64)
        a = self.affine.copy()
        along = float(a[:3, 0] @ self.normal)
        unit_step = a[:3, 0] / along
        a[:3, 3] = a[:3, 3] + (z[0] - self.z_mm[0]) * unit_step
        if len(z) > 1:
            a[:3, 0] = unit_step * float(np.mean(np.diff(z)))
        return replace(
            self,
            shape_zyx=(len(z), *self.shape_zyx[1:]),
            affine_lps=tuple(tuple(float(v) for v in row) for row in a),
            z_mm=tuple(float(v) for v in z),
            thickness_mm=self.thickness_mm if thickness_mm is None else thickness_mm,
        )

    def thin_grid(self, spacing_mm: float) -> Geometry:
        """The grid of ``spacing_mm`` that fills this series' scanned extent (28 x 5 mm gives 140 x 1 mm)."""
        low, high = self.extent_mm
        count = max(1, round((high - low) / spacing_mm))
        first = (low + high) / 2 - (count - 1) / 2 * spacing_mm
        return self.with_z(first + spacing_mm * np.arange(count))
