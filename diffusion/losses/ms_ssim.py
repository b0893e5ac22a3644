"""Multi-scale structural similarity of 2D images, differentiable (Wang, Simoncelli and Bovik 2003)."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

from latentcache import InputError

WINDOW = 11
SIGMA = 1.5
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang et al. 2003, section 3.2)."""


_log = logging.getLogger("ctpipe.msssim")
_said: set[tuple[int, int]] = set()


def scales_for(height: int, width: int) -> int:
    """Return how many of the five scales an image has room for: the 11-pixel window must fit at the coarsest.

    Five need 161 pixels. Fewer are logged once per size. Raises :class:`InputError` under 11 pixels.
    """
    side = min(height, width)
    if side < WINDOW:
        raise InputError(
            f"images of {height} x {width} pixels",
            expected=f"at least {WINDOW} pixels a side for MS-SSIM",
            remedy="Use a larger crop, or set the MS-SSIM weight to 0.",
        )
    scales = sum(side > (WINDOW - 1) << level for level in range(len(SCALE_WEIGHTS)))
    if scales < len(SCALE_WEIGHTS) and (height, width) not in _said:
        _said.add((height, width))
        _log.warning(
            "MS-SSIM uses %d of 5 scales: images of %d x %d pixels are under 161; their weights are renormalised",
            scales,
            height,
            width,
        )
    return scales


def ms_ssim(first_NHW: Tensor, second_NHW: Tensor, *, data_range: float) -> Tensor:
    """MS-SSIM of each image pair, (N,) float32 in [0, 1], 1 for equal images.

    Args:
        first_NHW, second_NHW: (N, H, W) images of the same size, at least 11 pixels a side.
        data_range: Largest minus smallest possible value.
    """
    height, width = first_NHW.shape[-2:]
    scales = scales_for(height, width)
    chosen = torch.tensor(SCALE_WEIGHTS[:scales], device=first_NHW.device)
    weights = chosen / chosen.sum()
    # Variances are differences of nearly equal numbers: bf16 would leave nothing of them.
    with torch.autocast(first_NHW.device.type, enabled=False):
        first, second = first_NHW.float()[:, None], second_NHW.float()[:, None]
        total = torch.ones(len(first), device=first.device)
        for scale in range(scales):
            similarity, contrast = _ssim(first, second, data_range)
            factor = similarity if scale == scales - 1 else contrast
            # Below zero the power is not real and its slope at zero is infinite.
            total = total * factor.clamp(min=1e-4) ** weights[scale]
            first, second = F.avg_pool2d(first, 2), F.avg_pool2d(second, 2)
    return total


def _ssim(first: Tensor, second: Tensor, data_range: float) -> tuple[Tensor, Tensor]:
    """Mean SSIM and mean contrast-structure of each image, (N,) each (Wang et al. 2004, equations 12 and 13)."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    moments = torch.cat([first, second, first * first, second * second, first * second])
    mu1, mu2, m11, m22, m12 = _blur(moments).chunk(5)
    contrast = (2 * (m12 - mu1 * mu2) + c2) / (m11 - mu1.square() + m22 - mu2.square() + c2)
    luminance = (2 * mu1 * mu2 + c1) / (mu1.square() + mu2.square() + c1)
    return (luminance * contrast).flatten(1).mean(1), contrast.flatten(1).mean(1)


def _blur(x_N1HW: Tensor) -> Tensor:
    """The Gaussian window of 11 pixels, where it fits wholly."""
    offset = torch.arange(WINDOW, device=x_N1HW.device, dtype=torch.float32) - WINDOW // 2
    kernel = torch.exp(-offset.square() / (2 * SIGMA**2))
    kernel = kernel / kernel.sum()
    return F.conv2d(F.conv2d(x_N1HW, kernel.reshape(1, 1, -1, 1)), kernel.reshape(1, 1, 1, -1))
