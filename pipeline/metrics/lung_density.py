"""Lung density: the share of emphysema-like voxels and its companions. Meaningful only where a window holds lung."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label

from latentcache import InputError
from pipeline.metrics.intensity import check

LUNG_BELOW_HU = -500.0
LAA_THRESHOLD_HU = -950.0


@dataclass(frozen=True)
class LungDensity:
    """Densities inside one lung mask.

    Attributes:
        laa950: Share (0 to 1) of lung voxels below -950 HU (Gevenois et al. 1996 for thin sections).
        pd15_hu: 15th percentile of lung HU (Perc15).
        mean_hu: Mean lung density.
        volume_ml: Volume of the mask.
    """

    laa950: float
    pd15_hu: float
    mean_hu: float
    volume_ml: float


def lung_mask(hu: NDArray[Any]) -> NDArray[np.bool_]:
    """Air-filled regions inside the body: below -500 HU, not connected to the in-plane border, not tiny.

    The airways belong to it; every method is measured in the same mask, so that they do not matter for differences.

    Raises:
        InputError: There is no such region.
    """
    air = np.asarray(hu < LUNG_BELOW_HU)
    regions, count = label(air)
    sizes = np.zeros(count + 1, dtype=np.int64)
    for piece in regions:  # slice by slice, since both steps widen their indices to 64 bit
        sizes += np.bincount(piece.ravel(), minlength=count + 1)
    sizes[0] = 0
    for face in (regions[:, 0], regions[:, -1], regions[:, :, 0], regions[:, :, -1]):
        sizes[np.unique(face)] = 0
    if sizes.max(initial=0) < 1000:
        raise InputError(
            "no lung inside the body", expected="a closed air-filled region", remedy="Leave lung density out."
        )
    chosen = sizes >= 0.1 * sizes.max()
    for k, piece in enumerate(regions):
        air[k] = chosen[piece]
    return air


def lung_density(hu: NDArray[Any], mask: NDArray[np.bool_], voxel_mm3: float) -> LungDensity:
    """LAA-950, Perc15 and mean HU inside the mask (z, y, x).

    Raises:
        InputError: An empty mask. NonFiniteError: NaN inside it.
    """
    check(hu, hu, mask)
    inside = hu[mask].astype(np.float32)
    return LungDensity(
        float(np.mean(inside < LAA_THRESHOLD_HU)),
        float(np.percentile(inside, 15)),
        float(np.mean(inside, dtype=np.float64)),
        float(inside.size * voxel_mm3 / 1000),
    )
