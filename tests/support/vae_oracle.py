"""MONAI's autoencoders with random weights: the oracles of the VAE tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

NARROW = {"channels": [8, 16, 32], "norm_num_groups": 8}
FULL = {"channels": [64, 128, 256], "norm_num_groups": 32}


def monai_maisi(channels: list[int], norm_num_groups: int, seed: int = 0, **settings: Any) -> nn.Module:
    """MAISI's class, unsplit, with weights that make every norm, bias and shortcut count."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    torch.manual_seed(seed)
    model = AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        num_channels=channels,
        num_res_blocks=(2, 2, 2),
        norm_num_groups=norm_num_groups,
        norm_eps=1e-6,
        attention_levels=(False, False, False),
        **{"num_splits": 1, "save_mem": False, **settings},
    )
    return _lively(model)


def monai_kl(channels: list[int], norm_num_groups: int, seed: int = 0) -> nn.Module:
    """MONAI's plain autoencoder in the shape of MAISI's; upsamples to the nearest voxel."""
    from monai.networks.nets import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        channels=channels,
        num_res_blocks=(2, 2, 2),
        norm_num_groups=norm_num_groups,
        norm_eps=1e-6,
        attention_levels=(False, False, False),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    return _lively(model)


def _lively(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.3, 0.3)
    # The output stays within [0, 1], where nothing is clamped.
    last = list(model.decoder.parameters())
    last[-2].data.mul_(0.1)
    last[-1].data.fill_(0.5)
    return model.eval().requires_grad_(False)


def save(model: nn.Module, path: Path, architecture: dict[str, Any] | None) -> Path:
    """As safetensors under MONAI's names."""
    metadata = None if architecture is None else {"architecture": json.dumps(architecture)}
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path, metadata=metadata)
    return path


def padded(unit: Tensor, multiple: tuple[int, int, int] = (4, 32, 32)) -> Tensor:
    """(D, H, W) in [-1, 1] to MONAI's input: (1, 1, D', H', W') in [0, 1], edge-padded at the far ends."""
    d, h, w = (-n % m for n, m in zip(unit.shape, multiple, strict=True))
    return F.pad((unit[None, None] + 1) / 2, (0, w, 0, h, 0, d), mode="replicate")


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference over the largest absolute value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())
