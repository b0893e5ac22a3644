"""Inputs of the refiner, made in one place for training and for use.

On the thin slices' grid: 0, the linear estimate, thick HU interpolated along z and back-projected under the slice
profile; 1, the composed slices that it corrects, back-projected likewise, so that a network need not deconvolve;
2, the phase, how far a thin slice is from the nearest thick position, in thick spacings. On the thick slices' own
grid: 0, what was measured; 1, the width of the slice profile, in thick spacings. And where each thin slice is
between its two thick neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model import SliceProfile, slice_operator, upsampling as baselines
from pipeline.volume import Window, z_weights

FINE_CHANNELS, THICK_CHANNELS = 3, 2
COMPOSED = 1


class RefinerInput(NamedTuple):
    """One place's inputs, float32 in unit scale; a batch of them has one more axis in front.

    Attributes:
        fine: (3, D, H, W) on the thin slices' grid.
        thick: (2, K, H, W) on the thick slices' grid.
        below: (D,) int64: the thick slice below each thin one, at most K - 2; beyond the ends the outermost pair.
        between: (D,) where between that slice and the next, 0 to 1.
    """

    fine: NDArray[np.float32]
    thick: NDArray[np.float32]
    below: NDArray[np.int64]
    between: NDArray[np.float32]


@dataclass(frozen=True)
class ThickView:
    """The thick series as seen from the thin slices.

    Attributes:
        average: (n_thick, n_thin) A: what a thick slice averages.
        project: (n_thin, n_thick) Q: x + Q (y - A x) are ten rounds of back-projection at once; columns of thick slices
            that the thin grid does not cover are zero.
        linear: (n_thin, n_thick): the linear estimate is this times y.
        phase: (n_thin,) distance from the nearest thick position, in thick spacings.
        place: (n_thin,) position in units of thick slices, 0 at the first, n_thick - 1 at the last.
        width: Standard deviation of the slice profile, in thick spacings.
    """

    average: NDArray[np.float32]
    project: NDArray[np.float32]
    linear: NDArray[np.float32]
    phase: NDArray[np.float32]
    place: NDArray[np.float32]
    width: float

    @classmethod
    def of(cls, thick_z_mm: NDArray[Any], thin_z_mm: NDArray[Any], profile: SliceProfile) -> ThickView:
        """Positions in mm along the normal, ascending; ``profile`` is what the thick slices are thought to average."""
        thick, thin = np.asarray(thick_z_mm, np.float64), np.asarray(thin_z_mm, np.float64)
        operator = slice_operator(profile, thick, thin)
        cubic = z_weights(thick, thin, "cubic")
        spacing = float(np.mean(np.diff(thick)))
        away = np.abs(thin[:, None] - thick[None, :]).min(axis=1) / spacing
        return cls(
            operator.matrix.astype(np.float32),
            baselines.projection(operator, cubic).astype(np.float32),
            baselines.back_projection_weights(operator, cubic).astype(np.float32),
            np.minimum(away, 1.0).astype(np.float32),
            np.interp(thin, thick, np.arange(len(thick))).astype(np.float32),
            profile.standard_deviation_mm / spacing,
        )

    def back_projected(self, thick_hu: NDArray[Any], composed_hu: NDArray[np.float32]) -> NDArray[np.float32]:
        """Composed HU (n_thin, H, W) with ten rounds of agreement with ``thick_hu`` (n_thick, H, W) added."""
        measured, x = _columns(thick_hu), _columns(composed_hu)
        return np.asarray((x + self.project @ (measured - self.average @ x)).reshape(composed_hu.shape))

    def inputs(
        self,
        thick_hu: NDArray[Any],
        composed_hu: NDArray[np.float32],
        window: Window,
        depth: slice = slice(None),
        reach: int | None = None,
    ) -> RefinerInput:
        """Inputs for the thin slices ``depth``.

        Args:
            thick_hu: (n_thick, H, W) HU: every thick slice of these columns.
            composed_hu: (n_thin, H, W) HU: every thin slice of these columns.
            window: Gives the unit scale.
            depth: Thin slices to be refined.
            reach: Thick slices to show, those about the middle of ``depth``; None for all.
        """
        places = self.place[depth]
        fine = np.empty((FINE_CHANNELS, len(places), *thick_hu.shape[1:]), np.float32)
        fine[0] = window.to_unit((self.linear[depth] @ _columns(thick_hu)).reshape(fine.shape[1:]))
        fine[COMPOSED] = window.to_unit(self.back_projected(thick_hu, composed_hu)[depth])
        fine[2] = self.phase[depth, None, None]
        shown = self.shown(places, len(thick_hu) if reach is None else min(reach, len(thick_hu)), len(thick_hu))
        thick = np.empty((THICK_CHANNELS, shown.stop - shown.start, *thick_hu.shape[1:]), np.float32)
        thick[0], thick[1] = window.to_unit(np.asarray(thick_hu[shown], np.float32)), np.float32(self.width)
        return RefinerInput(fine, thick, *neighbours(places - shown.start, len(thick[0])))

    @staticmethod
    def shown(places: NDArray[np.float32], count: int, n_thick: int) -> slice:
        """The ``count`` of ``n_thick`` slices about the middle of ``places``."""
        middle = (float(places[0]) + float(places[-1])) / 2
        start = int(np.clip(np.rint(middle - (count - 1) / 2), 0, n_thick - count))
        return slice(start, start + count)


def neighbours(places: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The slice below each place and where between it and the next (0 to 1), of ``count`` slices."""
    below = np.clip(np.floor(places), 0, max(0, count - 2)).astype(np.int64)
    return below, np.clip(places - below, 0.0, 1.0).astype(np.float32)


def _columns(hu: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(hu, dtype=np.float32).reshape(len(hu), -1)
