"""Facts of the thick series for a network, seen from the latent slices that it predicts: positions in mm.

The thick slices' phase against the latent slices (5 mm against 4 mm latents: a period of 20 mm) decides every
interpolation weight, and spacing and thickness differ by protocol; from latents alone a network can only guess both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

BELOW, ABOVE, SPACING, THICKNESS, PROFILE, POSITION = range(6)
FEATURES = 6
"""Rows of acquisition facts, (6, D) in mm: distance to the thick slice below and to the one above; the thick series'
spacing, slice thickness and profile width; the latent slice's own position."""


@dataclass(frozen=True)
class ThickSlices:
    """Places of a thick series' slices and what each averages, in mm.

    ``profile_mm`` is the width (FWHM) of its slice profile where that was measured, 0 where the thickness is used.
    """

    z0_mm: float
    spacing_mm: float
    count: int
    thickness_mm: float
    profile_mm: float = 0.0

    def seen_from(self, z_mm: ArrayLike) -> NDArray[np.float32]:
        """(6, D) float32 for D latent slices at ``z_mm``.

        The two slices are those around each position; beyond the ends the outermost pair, whose distance on the far
        side is then negative.
        """
        z = np.asarray(z_mm, np.float64)
        index = np.clip(np.floor((z - self.z0_mm) / self.spacing_mm), 0, max(0, self.count - 2))
        below = z - (self.z0_mm + index * self.spacing_mm)
        thickness = self.thickness_mm if self.thickness_mm > 0 else self.spacing_mm
        profile = self.profile_mm if self.profile_mm > 0 else thickness
        fixed = [np.full_like(z, value) for value in (self.spacing_mm, thickness, profile)]
        # Positions only ever meet as differences: relative to the first, float32 keeps them exact to a micrometre.
        return np.stack([below, self.spacing_mm - below, *fixed, z - z[0]]).astype(np.float32)


def informed(model: Callable[..., Tensor], told_BFD: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The model as objectives call it, ``model(x, t)``, with the batch's acquisition facts, if it takes any."""
    if told_BFD is None:
        return model

    def call(x_BCDHW: Tensor, t_B: Tensor) -> Tensor:
        return model(x_BCDHW, t_B, told_BFD)

    return call


def told_tensor(thick: ThickSlices, z_mm: ArrayLike, device: Any = None) -> Tensor:
    """Return a network's facts of one series, (1, 6, D) float32."""
    return torch.from_numpy(thick.seen_from(z_mm))[None].to(device)
