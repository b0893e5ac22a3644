"""The 3D U-Net that denoises latents given a condition. Depth is never resampled; in-plane grids are halved a level."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion.networks.acquisition import ABOVE, BELOW, FEATURES, POSITION
from diffusion.networks.blocks import (
    DepthAttention,
    Downsample,
    ModulatedNormSiLU,
    ProtocolEmbedding,
    ResidualBlock,
    TimeEmbedding,
    Upsample,
    fold_patches,
    unfold_patches,
    zero_initialised,
)
from diffusion.networks.config import UNetConfig
from latentcache import InputError

DISTANCE_MM = 5.0
"""Unit of the distances that the network sees."""


class Stage(nn.Module):
    """A residual block and, where the level attends, self-attention along depth: the unit of recomputation."""

    def __init__(self, channels_in: int, level: int, config: UNetConfig) -> None:
        super().__init__()
        channels = config.channels[level]
        self.block = ResidualBlock(channels_in, channels, config.groups, config.time_embedding)
        self.attention = (
            DepthAttention(channels, config.groups, config.heads, config.told)
            if level in config.attention_levels
            else None
        )

    def forward(self, x_BCDHW: Tensor, embedding_BE: Tensor, z_mm_BD: Tensor | None = None) -> Tensor:
        h: Tensor = self.block(x_BCDHW, embedding_BE)
        return h if self.attention is None else cast(Tensor, self.attention(h, z_mm_BD))


class UNet(nn.Module):
    """Denoising U-Net (Ho et al. 2020, appendix B; Dhariwal and Nichol 2021 for the modulation) on (D, H, W) latents.

    ``forward(x, t)`` takes x (B, latent + condition channels, D, H, W), the noisy latents followed by the condition,
    and t (B,) in [0, 1], and returns (B, latent channels, D, H, W). The last convolution starts at zero, and so does
    the output of an untrained network. A network with ``told`` also takes (B, 6, D), see ``networks.acquisition``;
    without it, it gets zeros, which no series ever is: that counts arithmetic, and predicts nothing.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self._recomputed: set[int] | None = None
        channels = config.channels
        fold = config.latent_patch**2
        self.time = TimeEmbedding(config.width, config.time_embedding)
        self.protocol = ProtocolEmbedding(config.time_embedding) if config.told else None
        channels_in = config.latent_channels + config.condition_channels + (2 if config.told else 0)
        self.conv_in = nn.Conv3d(fold * channels_in, channels[0], 3, padding=1)
        self.down = nn.ModuleList()
        skips = [channels[0]]
        current = channels[0]
        for level in range(len(channels)):
            for _ in range(config.blocks_per_level):
                self.down.append(Stage(current, level, config))
                current = channels[level]
                skips.append(current)
            if level < len(channels) - 1:
                self.down.append(Downsample(current))
                skips.append(current)
        self.middle = nn.ModuleList(
            ResidualBlock(current, current, config.groups, config.time_embedding) for _ in range(2)
        )
        self.up = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for _ in range(config.blocks_per_level + 1):
                self.up.append(Stage(current + skips.pop(), level, config))
                current = channels[level]
            if level > 0:
                self.up.append(Upsample(current))
        self.act_out = ModulatedNormSiLU(current, config.groups)
        self.conv_out = zero_initialised(nn.Conv3d(current, fold * config.latent_channels, 3, padding=1))

    def forward(self, x_BCDHW: Tensor, t_B: Tensor, told_BFD: Tensor | None = None) -> Tensor:
        self._check(x_BCDHW.shape)
        embedding, z_mm = self.time(t_B), None
        if self.protocol is not None:
            if told_BFD is None:
                told_BFD = x_BCDHW.new_zeros(len(x_BCDHW), FEATURES, x_BCDHW.shape[2])
            told_BFD = told_BFD.float()
            embedding, z_mm = embedding + self.protocol(told_BFD), told_BFD[:, POSITION]
            distances = told_BFD[:, BELOW : ABOVE + 1, :, None, None] / DISTANCE_MM
            distances = distances.expand(-1, -1, -1, *x_BCDHW.shape[3:])
            x_BCDHW = torch.cat([x_BCDHW, distances.to(x_BCDHW.dtype)], dim=1)
        dtype = self.conv_in.weight.dtype
        h = self.conv_in(fold_patches(x_BCDHW.to(dtype), self.config.latent_patch))
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else self._block(layer, h, embedding, z_mm)
            skips.append(h)
        for layer in self.middle:
            h = self._block(layer, h, embedding, None)
        for layer in self.up:
            if isinstance(layer, Upsample):
                h = layer(h)
            else:
                h = self._block(layer, torch.cat([h, skips.pop()], dim=1), embedding, z_mm)
        out = self.conv_out(self.act_out(h))
        return unfold_patches(out, self.config.latent_patch)

    def blocks(self) -> list[nn.Module]:
        """The units of recomputation, in the order in which they run."""
        layers = [*self.down, *self.middle, *self.up]
        return [layer for layer in layers if not isinstance(layer, (Downsample, Upsample))]

    def recompute(self, indices: Collection[int]) -> None:
        """Recompute these of `blocks` in the backward pass and keep the others, whatever the configuration says."""
        self._recomputed = {id(block) for i, block in enumerate(self.blocks()) if i in indices}

    def _block(self, layer: nn.Module, h: Tensor, embedding: Tensor, z_mm: Tensor | None) -> Tensor:
        given = (h, embedding, z_mm) if isinstance(layer, Stage) else (h, embedding)
        wanted = self.config.activation_checkpointing if self._recomputed is None else id(layer) in self._recomputed
        if wanted and self.training and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(layer, *given, use_reentrant=False))
        return cast(Tensor, layer(*given))

    def _check(self, shape: Sequence[int]) -> None:
        config = self.config
        channels = config.latent_channels + config.condition_channels
        if len(shape) != 5 or shape[1] != channels:
            raise InputError(
                f"a tensor of shape {tuple(shape)}",
                expected=f"(batch, {channels}, depth, height, width): noisy latents followed by the condition",
                remedy="Concatenate both along dimension 1.",
            )
        multiple = config.in_plane_multiple
        if shape[3] % multiple or shape[4] % multiple:
            raise InputError(
                f"a latent grid of {shape[3]} x {shape[4]}",
                expected=f"height and width that are multiples of {multiple}",
                remedy=f"Pad in-plane to multiples of {multiple} latents ({4 * multiple} pixels).",
            )


def build_unet(config: UNetConfig) -> UNet:
    """The U-Net of a configuration, initialised by torch's current random state, on torch's current default device."""
    return UNet(config)


def parameter_count(config: UNetConfig) -> int:
    """Number of parameters, counted without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(config).parameters())
