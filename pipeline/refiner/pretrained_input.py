"""Inputs of the shipped refiner, made in one place for training and for use: its unit scale, its inputs, its facts.

Beside pixels the network is given four figures: the width of the slice profile and the side of a cell, both in thick
spacings; and of each thin slice the spacing, likewise, and how far it is from the nearest thick one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model import SliceProfile, slice_operator, upsampling as baselines
from pipeline.volume import z_weights

Array = NDArray[np.float32]
HU_RANGE = (-1024.0, 3071.0)
KNEE_HU, ABOVE = 1000.0, 0.25
"""The unit scale is HU / 1000 up to the knee; above it, bone and metal, it rises by a quarter of that."""


def to_unit(hu: NDArray[Any]) -> Array:
    """HU to unit scale, clipped to HU_RANGE; float32."""
    out: Array = np.clip(hu, *HU_RANGE).astype(np.float32)
    above = out > KNEE_HU
    out[above] = KNEE_HU + (out[above] - KNEE_HU) * np.float32(ABOVE)
    out /= np.float32(KNEE_HU)
    return out


def from_unit(unit: Array) -> Array:
    """Unit scale to HU, clipped to HU_RANGE; float32."""
    out = np.asarray(unit, np.float32) * np.float32(KNEE_HU)
    above = out > KNEE_HU
    out[above] = KNEE_HU + (out[above] - KNEE_HU) / np.float32(ABOVE)
    np.clip(out, *HU_RANGE, out=out)
    return out


def linear_weights(profile: SliceProfile, thick_z_mm: NDArray[Any], thin_z_mm: NDArray[Any]) -> Array:
    """The linear estimate that is refined, (n_thin, n_thick): cubic interpolation, back-projected under ``profile``."""
    operator = slice_operator(profile, thick_z_mm, thin_z_mm)
    start = z_weights(thick_z_mm, thin_z_mm, "cubic")
    return baselines.back_projection_weights(operator, start).astype(np.float32)


def facts_of(
    profile: SliceProfile, spacing_mm: float, cell_mm: float, thin_mm: float, between: Array
) -> tuple[Array, Array]:
    """Facts of the thick grid, (2,), and of every thin slice, (2, D).

    Args:
        profile: What the linear estimate believes in.
        spacing_mm, cell_mm, thin_mm: Thick spacing, side of a cell, thin spacing.
        between: (D,) where between its thick neighbours each thin slice is, 0 to 1.
    """
    facts = np.asarray([profile.standard_deviation_mm / spacing_mm, cell_mm / spacing_mm], np.float32)
    away = np.minimum(between, 1 - between).astype(np.float32)
    return facts, np.stack([np.full_like(away, thin_mm / spacing_mm), away])
