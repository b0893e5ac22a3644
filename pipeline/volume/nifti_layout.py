"""Layout of voxels in a NIfTI file, and its map onto this project's: axes zyx, patient space LPS.

NIfTI's affine maps indices (i, j, k) to RAS millimetres; which patient axis each index runs along, and which way, is
the file's own choice. A layout remembers it, so that a derived volume goes back as its source came.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.volume.geometry import Geometry

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class NiftiLayout:
    """Axes of a NIfTI array.

    Attributes:
        axes_zyx: The array's axis that runs along z, y and x of the patient.
        flipped_zyx: Whether it runs from head to feet, from back to front, from left to right.
        suffix: ``.nii`` or ``.nii.gz``.
    """

    axes_zyx: tuple[int, int, int]
    flipped_zyx: tuple[bool, bool, bool]
    suffix: str = ".nii.gz"

    @classmethod
    def of(cls, affine_ras: NDArray[Any], suffix: str = ".nii.gz") -> NiftiLayout:
        """The layout whose axes lie nearest to those of the patient; ``affine_ras`` (4, 4) must not be singular."""
        steps = (_RAS_TO_LPS @ np.asarray(affine_ras, np.float64))[:3, :3]
        cosines = steps / np.linalg.norm(steps, axis=0)
        orders = itertools.permutations(range(3))
        x, y, z = max(orders, key=lambda order: sum(abs(cosines[row, axis]) for row, axis in enumerate(order)))
        flipped = tuple(bool(cosines[row, axis] < 0) for row, axis in ((2, z), (1, y), (0, x)))
        return cls((z, y, x), (flipped[0], flipped[1], flipped[2]), suffix)

    def to_zyx(self, array: NDArray[Any]) -> NDArray[Any]:
        """A view of a NIfTI array as (z, y, x)."""
        return array.transpose(self.axes_zyx)[self._slices]

    def from_zyx(self, volume: NDArray[Any]) -> NDArray[Any]:
        """A view of a (z, y, x) volume as the NIfTI array has it."""
        return volume[self._slices].transpose(np.argsort(self.axes_zyx))

    def affine_lps(self, affine_ras: NDArray[Any], shape_zyx: tuple[int, ...]) -> NDArray[np.float64]:
        """(4, 4) from (z, y, x, 1) to LPS, given the file's affine."""
        lps = _RAS_TO_LPS @ np.asarray(affine_ras, np.float64)
        return np.asarray(self._turned(lps[:, [*self.axes_zyx, 3]], shape_zyx))

    def affine_ras(self, geometry: Geometry) -> NDArray[np.float64]:
        """(4, 4) of the NIfTI array of a volume with this geometry."""
        turned = self._turned(geometry.affine, geometry.shape_zyx)
        return np.asarray(_RAS_TO_LPS @ turned[:, [*np.argsort(self.axes_zyx), 3]])

    @property
    def _slices(self) -> tuple[slice, ...]:
        return tuple(slice(None, None, -1 if flipped else 1) for flipped in self.flipped_zyx)

    def _turned(self, affine: NDArray[np.float64], shape_zyx: tuple[int, ...]) -> NDArray[np.float64]:
        """The affine after flipping, which inverts itself."""
        out = affine.copy()
        for axis, flipped in enumerate(self.flipped_zyx):
            if flipped:
                out[:3, 3] += (shape_zyx[axis] - 1) * affine[:3, axis]
                out[:3, axis] *= -1
        return out
