"""Aligns latents along z by physical position, never by index ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from latentcache import InputError, linear_neighbours


def align_depth(latent_CDHW: Tensor, z_from_mm: ArrayLike, z_to_mm: ArrayLike) -> Tensor:
    """The latent interpolated linearly along depth at other positions.

    Args:
        latent_CDHW: (C, d, h, w), d slices centred at ``z_from_mm``.
        z_from_mm: (d,) ascending positions in millimetres.
        z_to_mm: (e,) positions wanted. Beyond the ends the end slice is held: nothing is extrapolated.

    Returns:
        (C, e, h, w) float32 on the latent's device. Where a position coincides with a slice, that slice bit for bit.

    Raises:
        InputError: As many positions as slices are needed, in ascending order, finite, and at least one.
    """
    z_from = np.asarray(z_from_mm, dtype=np.float64).reshape(-1)
    z_to = np.asarray(z_to_mm, dtype=np.float64).reshape(-1)
    depth = latent_CDHW.shape[1]
    ascending = bool(np.all(np.diff(z_from) > 0)) and bool(np.isfinite(z_from).all() and np.isfinite(z_to).all())
    if len(z_from) != depth or depth == 0 or not ascending:
        raise InputError(
            f"{len(z_from)} positions{'' if ascending else ', not ascending or not finite,'} for {depth} latent slices",
            expected="one finite position a slice, ascending",
            remedy="Use z0_mm and dz_mm of the latent's manifest row.",
        )
    lower, upper, fraction = linear_neighbours(z_from, z_to)
    latent = latent_CDHW.float()
    device = latent.device
    weight = torch.as_tensor(fraction, dtype=torch.float32, device=device)[None, :, None, None]
    low = latent[:, torch.as_tensor(lower, device=device)]
    high = latent[:, torch.as_tensor(upper, device=device)]
    # (1 - w) low + w high, not low + w (high - low): exact at both ends.
    return (1 - weight) * low + weight * high


def same_extent(depth_from: int, depth_to: int) -> tuple[Sequence[float], Sequence[float]]:
    """Positions of ``depth_from`` and of ``depth_to`` equal slices that fill one and the same extent, in its units."""
    if depth_from < 1 or depth_to < 1:
        raise InputError(
            f"depths {depth_from} and {depth_to}", expected="at least one slice each", remedy="Change target_depth."
        )
    return [(i + 0.5) / depth_from for i in range(depth_from)], [(i + 0.5) / depth_to for i in range(depth_to)]
