"""The MAISI autoencoder's layers, under names of our own, and the plain (unsplit, differentiable) forward pass.

The layer graph is that of the KL autoencoder of latent diffusion (Rombach et al., 2022, appendix G; volumetric form in
Guo et al., MAISI, 2024): GroupNorm, SiLU, 3x3x3 convolutions, downsampling by an asymmetrically padded strided
convolution, upsampling by interpolation and a convolution. No attention, so that every layer but GroupNorm is local.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentcache import InputError

Upsampling = Literal["trilinear", "nearest"]
_UPSAMPLING_OF_CLASS: dict[str, Upsampling] = {"AutoencoderKlMaisi": "trilinear", "AutoencoderKL": "nearest"}


@dataclass(frozen=True)
class VaeArchitecture:
    """Everything that shapes the network. The defaults are MAISI's published configuration: 130 tensors, 20.9M values.

    Attributes:
        channels: Width of every level, finest first; each further level halves the grid.
        num_res_blocks: Residual blocks a level.
        upsampling: How the decoder doubles the grid before a convolution: MAISI's class interpolates trilinearly,
            MONAI's plain ``AutoencoderKL`` repeats the nearest voxel: two functions of one state dict.
    """

    channels: tuple[int, ...] = (64, 128, 256)
    num_res_blocks: tuple[int, ...] = (2, 2, 2)
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    latent_channels: int = 4
    upsampling: Upsampling = "trilinear"

    def __post_init__(self) -> None:
        problem = (
            "no level"
            if not self.channels
            else f"{len(self.num_res_blocks)} block counts for {len(self.channels)} levels"
            if len(self.num_res_blocks) != len(self.channels)
            else f"channels {self.channels} with {self.norm_num_groups} groups"
            if any(c <= 0 or c % self.norm_num_groups for c in self.channels)
            else f"upsampling {self.upsampling!r}"
            if self.upsampling not in get_args(Upsampling)
            else ""
        )
        if problem:
            raise InputError(
                f"a VAE architecture with {problem}",
                expected="one block count a level, channels divisible by the groups, trilinear or nearest upsampling",
                remedy="Correct the `architecture` entry in the checkpoint's metadata.",
            )

    @property
    def compression(self) -> int:
        """Voxels per latent along each axis."""
        return int(2 ** (len(self.channels) - 1))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; part of what an encode key hashes."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, raw: dict[str, Any], default: VaeArchitecture | None = None) -> VaeArchitecture:
        """From JSON; ``default`` supplies what ``raw`` leaves out.

        Unknown keys are refused. ``class``, the name of the MONAI class that was trained, says how it upsamples.
        """
        known = (default or cls()).to_dict()
        raw = dict(raw)
        if (kind := str(raw.pop("class", "")).rpartition(".")[2]) in _UPSAMPLING_OF_CLASS:
            known["upsampling"] = _UPSAMPLING_OF_CLASS[kind]
        fixed = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "use_convtranspose": False}
        fixed |= {"with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False, "use_checkpoint": False}
        values = dict(known)
        for key, value in raw.items():
            if key in known:
                values[key] = value
            elif key == "class" or (key == "attention_levels" and not any(value)):
                continue
            elif key not in fixed or value != fixed[key]:
                raise InputError(
                    f"architecture entry {key}={value!r}",
                    expected=f"only {', '.join(known)}, with {', '.join(f'{k}={v}' for k, v in fixed.items())}",
                    remedy="This network is not a MAISI autoencoder; convert or retrain it.",
                )
        levels = len(values["channels"])
        blocks = values["num_res_blocks"]
        values["num_res_blocks"] = (blocks,) * levels if isinstance(blocks, int) else tuple(blocks)
        values["channels"] = tuple(values["channels"])
        return cls(**values)


class ResBlock(nn.Module):
    """``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``, with a 1x1x1 convolution on the shortcut if widths differ."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return torch.add(shortcut, h)


class Downsample(nn.Conv3d):
    """Halves the grid: a stride-2 convolution after one zero voxel at the far end of every axis."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (0, 1, 0, 1, 0, 1)))


class Upsample(nn.Conv3d):
    """Doubles the grid by interpolation, then convolves."""

    def __init__(self, channels: int, mode: Upsampling) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode=self.mode))


class Blocks(nn.Module):
    """A chain of layers; the parameters of layer i are named ``blocks.i``."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _encoder(a: VaeArchitecture) -> Blocks:
    blocks: list[nn.Module] = [nn.Conv3d(1, a.channels[0], 3, padding=1)]
    width = a.channels[0]
    for level, (channels, count) in enumerate(zip(a.channels, a.num_res_blocks, strict=True)):
        for _ in range(count):
            blocks.append(ResBlock(width, channels, a.norm_num_groups, a.norm_eps))
            width = channels
        if level < len(a.channels) - 1:
            blocks.append(Downsample(width))
    blocks += [nn.GroupNorm(a.norm_num_groups, width, a.norm_eps), nn.Conv3d(width, a.latent_channels, 3, padding=1)]
    return Blocks(blocks)


def _decoder(a: VaeArchitecture) -> Blocks:
    width = a.channels[-1]
    blocks: list[nn.Module] = [nn.Conv3d(a.latent_channels, width, 3, padding=1)]
    for level in reversed(range(len(a.channels))):
        for _ in range(a.num_res_blocks[level]):
            blocks.append(ResBlock(width, a.channels[level], a.norm_num_groups, a.norm_eps))
            width = a.channels[level]
        if level > 0:
            blocks.append(Upsample(width, a.upsampling))
    blocks += [nn.GroupNorm(a.norm_num_groups, width, a.norm_eps), nn.Conv3d(width, 1, 3, padding=1)]
    return Blocks(blocks)


class KlAutoencoder(nn.Module):
    """The network on intensities in [0, 1]; (B, 1, D, H, W) with every length a multiple of ``compression``."""

    def __init__(self, architecture: VaeArchitecture) -> None:
        super().__init__()
        self.architecture = architecture
        latent = architecture.latent_channels
        self.encoder = _encoder(architecture)
        self.decoder = _decoder(architecture)
        self.quant_conv_mu = nn.Conv3d(latent, latent, 1)
        self.quant_conv_log_sigma = nn.Conv3d(latent, latent, 1)
        self.post_quant_conv = nn.Conv3d(latent, latent, 1)

    def posterior(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to [-30, 20]) of the latent from the encoder's last features."""
        return self.quant_conv_mu(features), self.quant_conv_log_sigma(features).clamp(-30.0, 20.0)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unsplit forward pass: posterior mean and log-variance, each (B, 4, d, h, w)."""
        return self.posterior(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        """Unsplit forward pass: latents (B, 4, d, h, w) to (B, 1, D, H, W)."""
        image: Tensor = self.decoder(self.post_quant_conv(z))
        return image
