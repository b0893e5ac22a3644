"""What the refiner sees, made in one place for training and for use: three channels on the thin slices' grid.

0, the linear estimate: thick HU interpolated along z and back-projected under the slice profile, so that a network of a
few slices' reach need not learn to deconvolve; 1, the composed slices that it corrects; 2, the phase: how far a thin
slice lies from the nearest thick position, in thick spacings, since what is blurred depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import baselines
from pipeline.hu import Window
from pipeline.slice_profile import SliceProfile

CHANNELS = 3
COMPOSED = 1


@dataclass(frozen=True)
class ThickView:
    """The thick series as seen from the thin slices: ``weights`` (n_thin, n_thick) and ``phase`` (n_thin), float32."""

    weights: NDArray[np.float32]
    phase: NDArray[np.float32]

    @classmethod
    def of(cls, thick_z_mm: NDArray[Any], thin_z_mm: NDArray[Any], profile: SliceProfile) -> ThickView:
        """Positions in mm along the normal, ascending; ``profile`` is what the thick slices are thought to average."""
        thick, thin = np.asarray(thick_z_mm, np.float64), np.asarray(thin_z_mm, np.float64)
        weights = baselines.weights("cubic_back_projection", thick, thin, profile)
        away = np.abs(thin[:, None] - thick[None, :]).min(axis=1) / float(np.mean(np.diff(thick)))
        return cls(weights.astype(np.float32), np.minimum(away, 1.0).astype(np.float32))

    def inputs(
        self, thick_hu: NDArray[Any], depth: slice, composed_unit: NDArray[np.float32], window: Window
    ) -> NDArray[np.float32]:
        """The channels (3, D, H, W) of thin slices ``depth``, in the window's unit scale.

        Args:
            thick_hu: (n_thick, H, W) HU: every thick slice of these columns.
            composed_unit: (D, H, W) of those thin slices, in unit scale.
        """
        columns = np.ascontiguousarray(thick_hu, dtype=np.float32).reshape(len(thick_hu), -1)
        linear = (self.weights[depth] @ columns).reshape(composed_unit.shape)
        out = np.empty((CHANNELS, *composed_unit.shape), np.float32)
        out[0], out[COMPOSED], out[2] = window.to_unit(linear), composed_unit, self.phase[depth, None, None]
        return out
