"""Nodules of known size put into a volume at chosen sites: what a fabrication alarm is tried on.

A plant is a sphere with partial volume. Whether it is added to a truth, and so seen by the thick series too, or only to
an answer, in what no thick slice determines, is for whoever plants it to choose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from latentcache import InputError

DIAMETERS_MM = (3.0, 8.0)
"""Of nodules that guidelines ask to be followed or left, depending on their size."""
CONTRASTS_HU = (380.0, 880.0)
"""Over lung: ground glass, and soft tissue."""
APART_MM = (25.0, 14.0)
"""Along z and in-plane: sites closer than both would disturb each other."""
LUNG_HU = (-980.0, -650.0)
"""Mean HU about a site in even lung."""
SUPERSAMPLED = 4
Block = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Site:
    """A place for a nodule: its centre in voxels (z, y, x), its diameter and its contrast over lung in HU."""

    center_zyx: tuple[float, float, float]
    diameter_mm: float
    contrast_hu: float


def choose_sites(
    rng: np.random.Generator, hu: NDArray[np.floating], spacing_mm_zyx: tuple[float, float, float], count: int
) -> tuple[Site, ...]:
    """Draw ``count`` sites in even lung of a volume (z, y, x) HU, none near another, the same for the same generator.

    Raises:
        InputError: The lung has no room for so many.
    """
    dz, dy, dx = spacing_mm_zyx
    about = uniform_filter(np.asarray(hu, np.float32), [max(3, round(9 / d)) for d in (dz, dy, dx)], mode="nearest")
    margin = [int(np.ceil(12 / d)) for d in (dz, dy, dx)]
    inner = tuple(slice(m, n - m) for m, n in zip(margin, about.shape, strict=True))
    even = np.zeros(about.shape, bool)
    even[inner] = (about[inner] > LUNG_HU[0]) & (about[inner] < LUNG_HU[1])
    places = np.argwhere(even)
    sites: list[Site] = []
    taken = np.empty((0, 3))
    for index in rng.permutation(len(places)):
        at = places[index] + rng.uniform(-0.5, 0.5, 3)
        away = np.abs(taken - at) * (dz, dy, dx)
        if np.any((away[:, 0] < APART_MM[0]) & (away[:, 1:].max(axis=1) < APART_MM[1])):
            continue
        taken = np.vstack([taken, at])
        diameter, contrast = float(rng.uniform(*DIAMETERS_MM)), float(rng.choice(CONTRASTS_HU))
        sites.append(Site((float(at[0]), float(at[1]), float(at[2])), diameter, contrast))
        if len(sites) == count:
            return tuple(sites)
    raise InputError(
        f"room for {len(sites)} nodules in this lung",
        expected=f"{count}, at least {APART_MM[1]:g} mm apart",
        remedy="Ask for fewer, or plant in a larger phantom.",
    )


def nodule(
    site: Site, shape_zyx: tuple[int, ...], spacing_mm_zyx: tuple[float, float, float]
) -> tuple[Block, NDArray[np.float32]]:
    """The part of a volume that a nodule touches, and what it adds there in HU: contrast times covered share."""
    reach = [site.diameter_mm / 2 / d + 1 for d in spacing_mm_zyx]
    low = [max(0, int(np.floor(c - r))) for c, r in zip(site.center_zyx, reach, strict=True)]
    high = [min(n, int(np.ceil(c + r)) + 1) for c, r, n in zip(site.center_zyx, reach, shape_zyx, strict=True)]
    offsets = (np.arange(SUPERSAMPLED) + 0.5) / SUPERSAMPLED - 0.5
    squares = [
        np.square(((np.arange(a, b)[:, None] + offsets).ravel() - c) * d)
        for a, b, c, d in zip(low, high, site.center_zyx, spacing_mm_zyx, strict=True)
    ]
    inside = squares[0][:, None, None] + squares[1][:, None] + squares[2] <= (site.diameter_mm / 2) ** 2
    n = SUPERSAMPLED
    blocks = inside.reshape(inside.shape[0] // n, n, inside.shape[1] // n, n, inside.shape[2] // n, n)
    covered = blocks.mean(axis=(1, 3, 5), dtype=np.float32)
    block = (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))
    return block, np.asarray(covered * np.float32(site.contrast_hu), np.float32)
