"""Emphysema of a known extent in a phantom's lung: holes of air whose share below -950 HU is asked for, and measured.

Holes of 2 to 10 mm lie where a smooth random field is largest, as centrilobular emphysema clusters; they are cut until
the noise-free thin volume has the wanted LAA-950 (share of lung voxels below -950 HU, Gevenois et al. 1996). The noisy
thin series then has another: noise carries even lung across the threshold, and how much depends on dose and kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from latentcache import InputError

HOLE_HU = -985.0
"""Within a hole: air and what little tissue is left."""
LAA_HU = -950.0
FINE_MM, COARSE_MM = 1.6, 12.0
"""Scales of the field: of a single hole's wall, and of the clusters."""
WALL = 0.35
"""Width of a hole's wall in the field's standard deviation: a step in it, blurred as a scanner would."""


@dataclass(frozen=True)
class Emphysema:
    """A noise-free volume (z, y, x) HU with emphysema, its lung, and the LAA-950 in it: the truth."""

    hu: NDArray[np.float32]
    lung: NDArray[np.bool_]
    laa950: float


def with_emphysema(
    truth: NDArray[np.float32],
    lung: NDArray[np.bool_],
    spacing_mm_zyx: tuple[float, float, float],
    laa950: float,
    seed: int,
) -> Emphysema:
    """Cut holes into the lung of a noise-free volume until the share ``laa950`` of it is below -950 HU.

    Args:
        truth: (z, y, x) HU without noise.
        lung: The voxels that are lung; vessels within it stay as they are.
        laa950: 0 to 0.4; the holes differ by no more than 0.002 from it. What is below -950 HU anyway counts.

    Raises:
        InputError: A share outside of 0 to 0.4, or one that the lung exceeds without any hole.
    """
    if not 0 <= laa950 <= 0.4:
        raise InputError(f"LAA-950 of {laa950:g}", expected="0 to 0.4", remedy="Ask for a share of the lung.")
    own = float(np.mean(truth[lung] < LAA_HU))
    if own > laa950 + 0.002:
        raise InputError(
            f"a lung of LAA-950 {own:.3f} without any hole", expected=f"{laa950:g} or less", remedy="Ask for more."
        )
    if laa950 <= own + 0.002:
        return Emphysema(truth, lung, own)
    rng = np.random.default_rng([seed, 950])
    white = rng.standard_normal(truth.shape, dtype=np.float32)
    field = np.zeros(truth.shape, np.float32)
    for scale, weight in ((FINE_MM, 1.0), (COARSE_MM, 0.7)):
        smooth = gaussian_filter(white, [scale / d for d in spacing_mm_zyx])
        field += np.float32(weight) * smooth / smooth[lung].std()
    depth = np.minimum(truth, np.float32(HOLE_HU)) - truth
    open_to_air = lung & (truth < -700)  # a vessel or an airway's wall stays

    def cut(level: float) -> NDArray[np.float32]:
        share = np.clip((field - np.float32(level)) / np.float32(WALL) + np.float32(0.5), 0, 1)
        return np.asarray(truth + np.where(open_to_air, share * depth, 0), np.float32)

    low, high = float(field[lung].min()) - 1, float(field[lung].max()) + 1
    for _ in range(24):
        middle = (low + high) / 2
        if float(np.mean(cut(middle)[lung] < LAA_HU)) > laa950:
            low = middle
        else:
            high = middle
    hu = cut(high)
    return Emphysema(hu, lung, float(np.mean(hu[lung] < LAA_HU)))
