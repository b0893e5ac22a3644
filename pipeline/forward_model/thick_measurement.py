"""A measurement in one piece: the thick series, the operator that thin slices reach it by, and its noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model.slice_profile import SliceOperator, SliceProfile, default_profile, slice_operator
from pipeline.volume import Volume

NOISE_TILE = 8
"""Side of the tiles in which noise is measured, in 2x2 blocks."""
THIN_NOISE_SHARE = 1.2
"""The residual of a true thin series over the thick slices' noise: re-averaged thin slices bring noise of their own
(0.7 of the thick slices' on a real pair of one acquisition: hypot(1, 0.7) = 1.2)."""


@dataclass(frozen=True, eq=False)
class ThickMeasurement:
    """y = A x + noise, made once per series and handed to all that composes, refines, projects or judges an output.

    Attributes:
        volume: The thick series, (K, y, x) HU, on the output's in-plane grid.
        operator: A, from the output's N thin positions to the K thick ones.
        noise_hu: RMS(A x - y) of a true thin series x: what an output is asked to reach. A profile fitted on a pair
            comes with the residual of that pair's own thin series, which also holds what no profile explains.
    """

    volume: Volume
    operator: SliceOperator
    noise_hu: float

    @classmethod
    def of(
        cls,
        volume: Volume,
        thin_z_mm: NDArray[Any] | tuple[float, ...],
        profile: SliceProfile | None = None,
        noise_hu: float | None = None,
    ) -> ThickMeasurement:
        """Build A at ``thin_z_mm`` (N,) mm; by default with the box of the stated thickness and the measured noise."""
        own = profile or stated_profile(volume)
        operator = slice_operator(own, np.asarray(volume.geometry.z_mm), np.asarray(thin_z_mm))
        noise = THIN_NOISE_SHARE * measurement_noise(volume.hu) if noise_hu is None else noise_hu
        return cls(volume, operator, noise)

    @property
    def hu(self) -> NDArray[Any]:
        """(K, y, x) HU."""
        return self.volume.hu

    @property
    def profile(self) -> SliceProfile:
        return self.operator.profile

    @property
    def thick_z_mm(self) -> NDArray[np.float64]:
        """(K,) positions of the thick slices, mm."""
        return self.operator.thick_z_mm

    @property
    def thin_z_mm(self) -> NDArray[np.float64]:
        """(N,) positions of the thin slices, mm."""
        return self.operator.thin_z_mm

    @property
    def shape_zyx(self) -> tuple[int, int, int]:
        """Of an output that can be held against it."""
        return (len(self.thin_z_mm), self.hu.shape[1], self.hu.shape[2])

    @property
    def spacing_mm(self) -> float:
        """Mean distance of the output's slices; the profile's width where there is one slice."""
        z = self.thin_z_mm
        return float(np.mean(np.diff(z))) if len(z) > 1 else self.profile.fwhm_mm


def stated_profile(thick: Volume) -> SliceProfile:
    """The box of the slice thickness that the scanner states."""
    return default_profile(thick.geometry.thickness_mm, thick.geometry.spacing_mm_zyx[0])


def measurement_noise(thick: NDArray[Any]) -> float:
    """Noise of the thick slices in HU, from the in-plane second difference of each 2x2 block, where anatomy is even.

    (a - b - c + d) / 2 has the variance of one pixel for white noise and vanishes on planes; its median absolute
    deviation is taken a tile, and the median over the body's tiles, so that edges count little (after Donoho's
    estimator on the finest diagonal detail). CT noise is correlated in-plane, so this is a lower bound; it is floored
    at 1 HU, the step of the stored values.
    """
    side = 2 * NOISE_TILE
    rows, columns = (n // side for n in thick.shape[1:])
    even = thick[:, : max(rows * side, 2), : max(columns * side, 2)].astype(np.float32)
    detail = np.abs(even[:, ::2, ::2] - even[:, ::2, 1::2] - even[:, 1::2, ::2] + even[:, 1::2, 1::2]) / 2
    if rows == 0 or columns == 0:
        return max(1.0, float(np.median(detail) / 0.6745))
    tiles = detail.reshape(len(thick), rows, NOISE_TILE, columns, NOISE_TILE)
    spread = np.median(tiles, axis=(2, 4)) / 0.6745
    level = even.reshape(len(thick), rows, side, columns, side).mean(axis=(2, 4))
    inside = level > -300
    return max(1.0, float(np.median(spread[inside] if inside.any() else spread)))
