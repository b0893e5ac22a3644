"""Building blocks of the U-Net.

Shapes: B batch, C channels, D depth, H height, W width; E time embedding; P in-plane positions of the whole batch,
T tokens along depth, N heads, K features of a head.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.networks.acquisition import PROFILE, SPACING
from diffusion.networks.column_attention import column_attention
from diffusion.networks.fused_norm import is_fused, norm_act

_M = TypeVar("_M", bound=nn.Module)


USUAL_MM = 5.0
"""Spacing whose embedding is that of nothing unusual."""
SHORTEST_MM, LONGEST_MM = 8.0, 512.0
"""Wavelengths of positions: two latent slices of 1 mm thin slices, and a scan."""


def _on_default_device(constants: Tensor) -> Tensor:
    """Constants that were computed on the CPU: on the meta device PyTorch would import all of its compiler for it."""
    return constants.to(torch.get_default_device())


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t in [0, 1] (Vaswani et al. 2017, section 3.5, over 1000 t) through a two-layer MLP."""

    frequencies: Tensor

    def __init__(self, features: int, embedding: int) -> None:
        super().__init__()
        half = features // 2
        exponents = -math.log(10000.0) * torch.arange(half, device="cpu") / half
        self.register_buffer("frequencies", _on_default_device(1000.0 * torch.exp(exponents)), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, embedding), nn.SiLU(), nn.Linear(embedding, embedding), nn.SiLU())

    def forward(self, t_B: Tensor) -> Tensor:
        # Phases reach 1000 radians: in bf16 neighbouring times would fall together.
        phase = t_B.float()[:, None] * self.frequencies.float()[None]
        features = torch.cat([phase.cos(), phase.sin()], dim=1)
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        embedded: Tensor = self.mlp(features.to(first.weight.dtype))
        return embedded


class ProtocolEmbedding(nn.Module):
    """Spacing, thickness and profile width of the thick series through a two-layer MLP that begins at zero.

    Widths are compared by ratio (5 to 6 mm is as much as 2.5 to 3), so their logarithms are what is embedded.
    """

    def __init__(self, embedding: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(3, embedding), nn.SiLU(), zero_initialised(nn.Linear(embedding, embedding)))

    def forward(self, told_BFD: Tensor) -> Tensor:
        widths = (told_BFD[:, SPACING : PROFILE + 1, 0].float() / USUAL_MM).clamp(min=1e-3).log()
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        embedded: Tensor = self.mlp(widths.to(first.weight.dtype))
        return embedded


class ModulatedNormSiLU(nn.Module):
    """GroupNorm, optional scale and shift from the time embedding, SiLU: what torch.compile fuses into one pass."""

    def __init__(self, channels: int, groups: int, embedding: int | None = None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.modulation = nn.Linear(embedding, 2 * channels) if embedding else None

    def forward(self, x_BCDHW: Tensor, embedding_BE: Tensor | None = None) -> Tensor:
        if is_fused(x_BCDHW):
            return norm_act(self.norm, x_BCDHW, None if self.modulation is None else self.modulation(embedding_BE))
        h = group_norm(self.norm, x_BCDHW)
        if self.modulation is not None:
            assert embedding_BE is not None
            scale, shift = self.modulation(embedding_BE)[:, :, None, None, None].to(h.dtype).chunk(2, dim=1)
            h = h * (1 + scale) + shift
        return F.silu(h)


class ResidualBlock(nn.Module):
    """Pre-activation residual block with a zero-initialised last convolution (identity or 1x1x1 at the start)."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, embedding: int) -> None:
        super().__init__()
        self.act1 = ModulatedNormSiLU(channels_in, groups)
        self.conv1 = nn.Conv3d(channels_in, channels_out, 3, padding=1)
        self.act2 = ModulatedNormSiLU(channels_out, groups, embedding)
        self.conv2 = zero_initialised(nn.Conv3d(channels_out, channels_out, 3, padding=1))
        self.shortcut: nn.Module = (
            nn.Identity() if channels_in == channels_out else nn.Conv3d(channels_in, channels_out, 1)
        )

    def forward(self, x_BCDHW: Tensor, embedding_BE: Tensor) -> Tensor:
        h = self.conv1(self.act1(x_BCDHW))
        h = self.conv2(self.act2(h, embedding_BE))
        out: Tensor = self.shortcut(x_BCDHW) + h
        return out


class DepthAttention(nn.Module):
    """Multi-head self-attention along depth at every in-plane position, with RMS-normalised queries and keys.

    QK-norm (Dehghani et al. 2023, section 2) bounds the logits, so that bf16 training does not diverge. Cost grows
    with D squared per column, not with (D H W) squared. With ``positions`` queries and keys are turned by the slices'
    places in mm (Su et al. 2021, section 3.2), so that they meet by distance, whatever the spacing.
    """

    wave_numbers: Tensor

    def __init__(self, channels: int, groups: int, heads: int, positions: bool = False) -> None:
        super().__init__()
        pairs = channels // heads // 2 if positions else 0
        waves = SHORTEST_MM * (LONGEST_MM / SHORTEST_MM) ** (torch.arange(pairs, device="cpu") / max(1, pairs - 1))
        self.register_buffer("wave_numbers", _on_default_device(2 * math.pi / waves), persistent=False)
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = nn.RMSNorm(channels // heads)
        self.k_norm = nn.RMSNorm(channels // heads)
        self.out = zero_initialised(nn.Linear(channels, channels))

    def forward(self, x_BCDHW: Tensor, z_mm_BD: Tensor | None = None) -> Tensor:
        b, c, d, h, w = x_BCDHW.shape
        tokens_PTC = group_norm(self.norm, x_BCDHW).permute(0, 3, 4, 2, 1).reshape(b * h * w, d, c)
        qkv = self.qkv(tokens_PTC).view(b * h * w, d, 3, self.heads, c // self.heads)
        q_PNTK, k_PNTK, v_PNTK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q_PNTK, k_PNTK = self.q_norm(q_PNTK), self.k_norm(k_PNTK)
        if z_mm_BD is not None and len(self.wave_numbers):
            phase_BTR = z_mm_BD.float()[:, :, None] * self.wave_numbers.float()
            q_PNTK, k_PNTK = turned(q_PNTK, phase_BTR), turned(k_PNTK, phase_BTR)
        q_PNTK, k_PNTK = q_PNTK.to(v_PNTK.dtype), k_PNTK.to(v_PNTK.dtype)
        mixed = column_attention(q_PNTK, k_PNTK, v_PNTK)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(b * h * w, d, c))
        return x_BCDHW + out.view(b, h, w, d, c).permute(0, 4, 3, 1, 2)


class Downsample(nn.Module):
    """Halves height and width, keeps depth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        out: Tensor = self.conv(x_BCDHW)
        return out


class Upsample(nn.Module):
    """Doubles height and width by repetition and smooths with a convolution; keeps depth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x_BCDHW: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x_BCDHW, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))
        return out


def turned(x_PNTK: Tensor, phase_BTR: Tensor) -> Tensor:
    """Features r and r + K/2 of every head turned by ``phase`` in their plane; P holds the batch's columns in turn."""
    p, n, t, k = x_PNTK.shape
    x = x_PNTK.float().reshape(len(phase_BTR), -1, n, t, k)
    first, second = x.chunk(2, dim=-1)
    cos, sin = phase_BTR.cos()[:, None, None], phase_BTR.sin()[:, None, None]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).reshape(p, n, t, k)


def group_norm(norm: nn.GroupNorm, x_BCDHW: Tensor) -> Tensor:
    """GroupNorm in the input's own dtype, whatever autocast says.

    Autocast would keep a float32 output for the backward pass; the statistics are accumulated in float32 anyway, so
    bf16 in and out halves the activation memory at no loss.
    """
    if is_fused(x_BCDHW):
        return norm_act(norm, x_BCDHW, silu=False)
    dtype, device = x_BCDHW.dtype, x_BCDHW.device.type
    plain = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
    with plain:
        return F.group_norm(x_BCDHW, norm.num_groups, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)


def zero_initialised(module: _M) -> _M:
    """The same module with every parameter zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def fold_patches(x_BCDHW: Tensor, patch: int) -> Tensor:
    """(B, C, D, H, W) to (B, C p p, D, H/p, W/p): p x p in-plane neighbours become channels."""
    if patch == 1:
        return x_BCDHW
    b, c, d, h, w = x_BCDHW.shape
    x = x_BCDHW.reshape(b, c, d, h // patch, patch, w // patch, patch)
    return x.permute(0, 1, 4, 6, 2, 3, 5).reshape(b, c * patch * patch, d, h // patch, w // patch)


def unfold_patches(x_BCDHW: Tensor, patch: int) -> Tensor:
    """The inverse of :func:`fold_patches`."""
    if patch == 1:
        return x_BCDHW
    b, c, d, h, w = x_BCDHW.shape
    x = x_BCDHW.reshape(b, c // patch**2, patch, patch, d, h, w)
    return x.permute(0, 1, 4, 5, 2, 6, 3).reshape(b, c // patch**2, d, h * patch, w * patch)
