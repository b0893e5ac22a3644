"""Encoding and decoding in overlapping windows, as the field does it: a reference to compare with, not a way to work.

Every window has GroupNorm statistics of its own, so the result depends on the windows and differs from the unsplit
forward pass everywhere; blending hides the seams, not the difference. Windows never leave the volume: a volume smaller
than the window is extended by reflection, since air beside the body would shift the statistics further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from latentcache.errors import InputError


def window_starts(length: int, window: int, step: int) -> list[int]:
    """Starts of windows that cover ``length`` and stay inside it; the last one is moved back to end at the end."""
    if length <= window:
        return [0]
    return [*range(0, length - window, step), length - window]


def blend(window: int, border: int) -> Tensor:
    """A trapezoid of length ``window`` that rises over ``border`` samples at both ends and is never zero."""
    i = torch.arange(window, dtype=torch.float32)
    return torch.minimum(i + 1, window - i).clamp_max(border + 1) / (border + 1)


def sliding(
    run: Callable[[Tensor], Tensor], x_CDHW: Tensor, window_zyx: tuple[int, int, int], overlap: float, scale: float
) -> Tensor:
    """Apply ``run``, a map of (1, C, d, h, w) to a grid ``scale`` times as fine, window by window, and blend.

    Args:
        window_zyx: Window in input samples; window times scale must be whole.
        overlap: Share of the window that neighbours share, 0 to below 1.

    Raises:
        InputError: An overlap outside [0, 1).
    """
    if not 0 <= overlap < 1:
        raise InputError(f"overlap {overlap}", expected="0 to below 1", remedy="0.4 is usual.")
    size = tuple(x_CDHW.shape[1:])
    x = reflect_to(x_CDHW, window_zyx)
    padded = tuple(x.shape[1:])
    total: Tensor | None = None
    weight = torch.zeros([round(n * scale) for n in padded])
    axes = [torch.ones(0)] * 3
    for axis, w in enumerate(window_zyx):
        axes[axis] = blend(round(w * scale), round(w * scale * overlap))
    mask = axes[0][:, None, None] * axes[1][:, None] * axes[2]
    for z, y, x0 in _corners(padded, window_zyx, overlap, scale):
        part = x[:, z : z + window_zyx[0], y : y + window_zyx[1], x0 : x0 + window_zyx[2]]
        out = run(part.unsqueeze(0))[0]
        if total is None:
            total = torch.zeros([len(out), *weight.shape])
        place = tuple(
            slice(round(o * scale), round(o * scale) + n) for o, n in zip((z, y, x0), out.shape[1:], strict=True)
        )
        total[(slice(None), *place)] += out * mask
        weight[place] += mask
    assert total is not None
    total /= weight
    return total[:, : round(size[0] * scale), : round(size[1] * scale), : round(size[2] * scale)]


def reflect_to(x_CDHW: Tensor, least_zyx: tuple[int, int, int]) -> Tensor:
    """Extend at the far ends by reflection until no length is below ``least_zyx``."""
    x = x_CDHW
    for axis, least in enumerate(least_zyx, start=1):
        while x.shape[axis] < least:
            extra = min(least - x.shape[axis], max(1, x.shape[axis] - 1))
            mirror = x.flip(axis).narrow(axis, 1 if x.shape[axis] > 1 else 0, extra)
            x = torch.cat([x, mirror], dim=axis)
    return x


def _corners(
    size: tuple[int, ...], window: tuple[int, int, int], overlap: float, scale: float
) -> Iterator[tuple[int, ...]]:
    # Starts stay on the coarser grid, so that a window's output falls on whole samples.
    grid = round(1 / scale) if scale < 1 else 1
    starts = []
    for length, w in zip(size, window, strict=True):
        step = max(grid, int(w * (1 - overlap)) // grid * grid)
        starts.append(window_starts(length, w, step))
    return product(*starts)
