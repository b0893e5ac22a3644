"""Runs a network on depth windows of a long latent and blends what it says, without a seam.

Blending happens on the network's output at every sampler step, so that all windows share one trajectory (as in
Bar-Tal et al. 2023, MultiDiffusion, equation 5): blending finished samples would average different noise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.networks import informed
from latentcache import InputError


def window_starts(depth: int, window: int, overlap: int) -> list[int]:
    """First slices of equally deep windows that cover ``depth``, neighbours overlapping by at least ``overlap``."""
    if window < 1 or not 0 <= overlap < window:
        raise InputError(
            f"a depth window of {window} with overlap {overlap}",
            expected="a positive window and an overlap smaller than it",
            remedy="Change depth_window or overlap.",
        )
    if depth <= window:
        return [0]
    count = -(-(depth - overlap) // (window - overlap))
    # Spread evenly, rather than squeezing the last window: every overlap is then about the same.
    return [round(i * (depth - window) / (count - 1)) for i in range(count)]


def blend_weights(window: int) -> Tensor:
    """(window,) float32: a raised cosine that is smallest, but never zero, at the window's ends."""
    centre = (torch.arange(window) + 0.5) / window
    return (0.5 - 0.5 * torch.cos(2 * torch.pi * centre)).clamp(min=1e-3)


class DepthWindows:
    """The same model on (B, C, D, H, W) of any D, evaluated on windows of at most ``window`` slices.

    A slice that is in several windows gets their weighted mean; the weights vary smoothly along depth. ``told_BFD``
    are the slices' facts, for a model that takes them.
    """

    def __init__(self, model: Callable[..., Tensor], window: int, overlap: int, told_BFD: Tensor | None = None) -> None:
        window_starts(window, window, overlap)
        self.model, self.window, self.overlap, self.told = model, window, overlap, told_BFD

    def __call__(self, x_BCDHW: Tensor, t_B: Tensor) -> Tensor:
        depth = x_BCDHW.shape[2]
        starts = window_starts(depth, self.window, self.overlap)
        if len(starts) == 1:
            return self._part(x_BCDHW, t_B, slice(None))
        weights = blend_weights(self.window).to(x_BCDHW.device)[:, None, None]
        total: Tensor | None = None
        norm = torch.zeros((depth, 1, 1), device=x_BCDHW.device)
        for start in starts:
            part = slice(start, start + self.window)
            out = self._part(x_BCDHW, t_B, part).float()
            if total is None:
                total = torch.zeros((*out.shape[:2], depth, *out.shape[3:]), device=out.device)
            total[:, :, part] += weights * out
            norm[part] += weights
        assert total is not None
        return total / norm

    def _part(self, x_BCDHW: Tensor, t_B: Tensor, part: slice) -> Tensor:
        """The model on some of the slices, with the facts of just these."""
        return informed(self.model, None if self.told is None else self.told[:, :, part])(x_BCDHW[:, :, part], t_B)
