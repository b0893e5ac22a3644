"""The VAE's slabs through Triton kernels, with statistics that stay on the device.

The PyTorch operations of `vae_stream` and `vae_norm` remain: on a CPU, without Triton, and on a device where the
kernels do not agree with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcache import triton_agrees
from pipeline.vae.streaming.group_norm import column_moments, row_width

_ASSUMED: ContextVar[bool | None] = ContextVar("fused VAE assumed", default=None)


@contextmanager
def assume_fused(fused: bool = True) -> Iterator[None]:
    """Inside, the kernels run (or do not), whatever the device: for Triton's interpreter, and to compare both paths."""
    before = _ASSUMED.set(fused)
    try:
        yield
    finally:
        _ASSUMED.reset(before)


def is_fused(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    assumed = _ASSUMED.get()
    if assumed is not None:
        return assumed and device.type != "meta"
    return device.type == "cuda" and usable(device.index or 0)


@lru_cache
def usable(index: int) -> bool:
    """Return whether Triton is there and agrees with PyTorch on this GPU; looked at once, on a small slab."""
    return triton_agrees(index, largest_difference, "the VAE runs")


def largest_difference(device: torch.device) -> float:
    """Of the kernels from PyTorch in float32, relative to the largest value, on a small slab."""
    from pipeline.vae.streaming import triton_kernels

    random = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn((4, 6, 8, 32), generator=random).to(device) for _ in range(3))
    first, last = (torch.randn(shape, generator=random).to(device) for shape in ((32, 1, 3, 3, 3), (1, 32, 3, 3, 3)))
    bias = torch.randn(32, generator=random).to(device)
    window, out, single = (torch.empty_like(x), torch.empty_like(x[:2]), torch.empty_like(x[:2, ..., :1]))
    with torch.inference_mode(), _on(device), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        triton_kernels.normalise(x, window, bias, bias, silu=True)
        pairs = [(window, F.silu(x * bias + bias))]
        kept = torch.empty_like(x)
        partial = triton_kernels.finish(x, bias, y, kept)
        whole = (x + bias + y).flatten(1, 2)
        pairs += [(kept, x + bias + y), (partial[:, 0], whole.mean(1)), (partial[:, 1], 48 * whole.var(1, False))]
        gray = z[..., :1].contiguous()
        triton_kernels.first_convolution(gray, taps_first(first), bias, out)
        triton_kernels.last_convolution(x, taps_first(last), bias[:1], single)
        for image, weight, offset, found in ((gray, first, bias, out), (x, last, bias[:1], single)):
            expected = F.conv3d(image.permute(3, 0, 1, 2)[None], weight, offset, padding=(0, 1, 1))
            pairs.append((found, expected[0].permute(1, 2, 3, 0)))
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def taps_first(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3, 3) or (1, C, 3, 3, 3) as (27, C)."""
    out, into = weight.shape[:2]
    return weight.reshape(max(out, into), 27).t().contiguous()


def _on(device: torch.device) -> torch.cuda.device:
    return torch.cuda.device(device if device.type == "cuda" else -1)


class DeviceMoments:
    """`ChannelMoments` without a transfer from the device.

    Partial results are kept there as they come, and joined in float64 when the statistics are wanted. `append` takes a
    kernel's; `add` makes them by PyTorch's operations.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        """Count, mean and sum of squared deviations of parts: (P,), (P, C), (P, C)."""

    def append(self, partial_P2C: Tensor, voxels: int, chunk: int) -> None:
        """Of slices of ``voxels`` voxels, each in chunks of ``chunk``."""
        chunks = -(-voxels // chunk)
        size = voxels - chunk * torch.arange(chunks, dtype=torch.float64, device=partial_P2C.device)
        count = size.clamp_(max=chunk).repeat(len(partial_P2C) // chunks)
        self.parts.append((count, partial_P2C[:, 0], partial_P2C[:, 1]))

    def add(self, slab_DHWC: Tensor) -> None:
        """Of a slab (n, H, W, C) of dense slices, in float32 by Welford's update, whatever its dtype."""
        columns = row_width(slab_DHWC)
        for part in [slab_DHWC] if slab_DHWC.is_contiguous() else list(slab_DHWC.unsqueeze(1)):
            rows = part.reshape(-1, columns)
            mean, variance = column_moments(rows)
            mean, m2 = mean.view(-1, self.channels), (variance * len(rows)).view(-1, self.channels)
            count = torch.full((len(mean),), float(len(rows)), dtype=torch.float64, device=part.device)
            self.parts.append((count, mean, m2))

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and sum of squared deviations (C,) of everything, float64, on the device."""
        counts, means, m2s = (torch.cat(parts).double() for parts in zip(*self.parts, strict=True))
        counts = counts[:, None]
        mean = (counts * means).sum(0) / counts.sum()
        return counts.sum(), mean, (m2s + counts * (means - mean).square()).sum(0)

    def affine(self, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,) float32 such that ``x * scale + shift`` is ``norm`` with these statistics."""
        count, channel_mean, m2 = self.totals()
        mean = channel_mean.view(norm.num_groups, -1)
        group_mean = mean.mean(dim=1, keepdim=True)
        variance = m2.view(norm.num_groups, -1).mean(dim=1, keepdim=True) / count
        variance = variance + (mean - group_mean).square().mean(dim=1, keepdim=True)
        inverse = torch.rsqrt(variance + norm.eps).expand_as(mean).reshape(-1)
        scale = inverse * norm.weight.detach().double()
        shift = norm.bias.detach().double() - group_mean.expand_as(mean).reshape(-1) * scale
        return scale.float(), shift.float()


class FusedAffine:
    """`Affine` in one pass of one kernel."""

    def __init__(self, scale: Tensor, shift: Tensor, *, silu: bool) -> None:
        self.scale, self.shift, self.silu = scale, shift, silu

    def apply(self, x_DHWC: Tensor, out_DHWC: Tensor) -> None:
        """Write into ``out_DHWC``, of the same shape; slices and rows of both may lie apart."""
        from pipeline.vae.streaming import triton_kernels

        with _on(x_DHWC.device):
            triton_kernels.normalise(x_DHWC, out_DHWC, self.scale, self.shift, silu=self.silu)


class FusedConvolution:
    """A 3x3x3 convolution over a window, by the convolution library or, of or to one channel, by a kernel.

    With bias, shortcut and statistics in the pass that writes its output.
    """

    def __init__(self, layer: nn.Conv3d, convolve: Callable[[Tensor], Tensor]) -> None:
        """``convolve`` takes a window to the convolution without its bias, (n, H, W, C) dense."""
        self.convolve = convolve
        self.first, self.last = layer.in_channels == 1, layer.out_channels == 1 and layer.stride == (1, 1, 1)
        self.taps = taps_first(layer.weight) if self.first or self.last else None
        self.bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias

    def write(
        self, window_DHWC: Tensor, shortcut: Tensor | None, out_DHWC: Tensor, moments: DeviceMoments | None
    ) -> None:
        """Into ``out_DHWC``, whose moments are counted."""
        from pipeline.vae.streaming import triton_kernels

        with _on(out_DHWC.device):
            if self.taps is None or shortcut is not None:
                partial = triton_kernels.finish(self.convolve(window_DHWC), self.bias, shortcut, out_DHWC)
            elif self.first:
                partial = triton_kernels.first_convolution(window_DHWC, self.taps, self.bias, out_DHWC)
            else:
                triton_kernels.last_convolution(window_DHWC, self.taps, self.bias, out_DHWC)
                assert moments is None, "nothing follows the last convolution"
                return
        if moments is not None:
            moments.append(partial, out_DHWC.shape[1] * out_DHWC.shape[2], triton_kernels.CHUNK)
