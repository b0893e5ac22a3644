"""GroupNorm over a volume that is never held whole: statistics gathered slab by slab, then applied with SiLU.

Slabs are (n, H, W, C), channels last. Statistics are per channel, merged in float64 by Chan's update
(Chan, Golub and LeVeque, 1983), so that neither the slab plan nor a large mean costs accuracy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_COLUMNS = 4096
"""Width of the rows that the statistics kernel sees; many short column sums are faster and more accurate than few."""


class ChannelMoments:
    """Count, mean and sum of squared deviations of every channel of the slabs seen so far (float64, on the CPU).

    For slabs on a GPU there is `fused.DeviceMoments`, which does not wait for the device.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.m2 = torch.zeros(channels, dtype=torch.float64)

    def add(self, slab_DHWC: Tensor) -> None:
        """Merge a slab (n, H, W, C) of dense slices."""
        if slab_DHWC.is_meta:  # a dry run of shapes, see `vae_plan`
            return
        channels = slab_DHWC.shape[-1]
        columns = row_width(slab_DHWC)
        # Slice by slice, so that the slab plan, which depends on free memory, does not show in the result.
        for part_DHWC in slab_DHWC.unsqueeze(1):
            rows = part_DHWC.view(-1, columns)
            mean, variance = column_moments(rows)
            mean, variance = (t.double().cpu().view(-1, channels) for t in (mean, variance))
            part = len(rows) * (columns // channels)
            total = mean.mean(dim=0)
            self._merge(part, total, part * (variance.mean(dim=0) + (mean - total).square().mean(dim=0)))

    def _merge(self, count: int, mean: Tensor, m2: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * (count / total)
        self.m2 += m2 + delta.square() * (self.count * count / total)
        self.count = total

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) float32 such that ``x * scale + shift`` is ``norm`` with these statistics."""
        if norm.weight.is_meta:
            return norm.weight, norm.bias
        groups = norm.num_groups
        mean = self.mean.view(groups, -1)
        group_mean = mean.mean(dim=1, keepdim=True)
        variance = self.m2.view(groups, -1).mean(dim=1, keepdim=True) / self.count
        variance = variance + (mean - group_mean).square().mean(dim=1, keepdim=True)
        inverse = torch.rsqrt(variance + norm.eps).expand_as(mean).reshape(-1)
        scale = inverse * norm.weight.detach().double().cpu()
        shift = norm.bias.detach().double().cpu() - group_mean.expand_as(mean).reshape(-1) * scale
        return scale.float().to(norm.weight.device), shift.float().to(norm.weight.device)


def row_width(slab_DHWC: Tensor) -> int:
    """The widest row of whole voxels up to about ``_COLUMNS`` values that divides a slice."""
    _, height, width, channels = slab_DHWC.shape
    voxels = height * width
    best = max(v for v in range(1, max(2, _COLUMNS // channels + 1)) if voxels % v == 0)
    return best * channels


def column_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every column, float32, by PyTorch's batch-norm kernels.

    On a CPU these run at memory speed, ten times faster than ``torch.var_mean``, and on a GPU they are Welford in
    float32 for any input.
    """
    image = rows.view(1, len(rows), 1, rows.shape[1]).permute(0, 3, 1, 2)
    if rows.is_cuda:
        eps = 1e-12
        mean, inverse = torch.batch_norm_stats(image, eps)
        return mean, inverse.double().pow(-2).sub(eps).clamp_min(0)
    mean, variance = torch.batch_norm_update_stats(image, None, None, 0.0)
    return mean, variance


class Affine:
    """``x * scale + shift`` for slabs, followed by SiLU where asked.

    It takes as few passes over memory as eager PyTorch allows.
    """

    def __init__(self, scale: Tensor, shift: Tensor, width: int, *, silu: bool) -> None:
        # Tiled over a row, so that the inner loop is a row long and not a handful of channels.
        self.scale = scale.repeat(width)
        self.shift = shift.repeat(width)
        self.silu = silu

    def apply(self, x_DHWC: Tensor, out_DHWC: Tensor) -> None:
        """Write into ``out_DHWC``, of the same shape; both hold dense rows of W*C values."""
        x, out = x_DHWC.flatten(2), out_DHWC.flatten(2)
        torch.addcmul(self.shift, x, self.scale, out=out)
        if self.silu:
            F.silu(out, inplace=True)
