"""Architecture of the tiny VAE and the linear autoencoder that its training starts from."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from monai.networks.nets.autoencoderkl import AutoencoderKL
from numpy.typing import NDArray

ARCHITECTURE: dict[str, Any] = {
    "class": "monai.networks.nets.AutoencoderKL",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "channels": [16, 32, 64],
    "num_res_blocks": [2, 2, 2],
    "attention_levels": [False, False, False],
    "latent_channels": 4,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
LATENT_SIGMA = 0.02
"""Standard deviation of the posterior, everywhere: it keeps the decoder smooth, and only the mean is ever cached."""
ANCHOR = 6.0
"""Level of the channel pairs that keep GroupNorm near the identity; the signal beside them has unit variance."""


def build() -> AutoencoderKL:
    return AutoencoderKL(**{k: v for k, v in ARCHITECTURE.items() if k != "class"})


def start_linear(model: AutoencoderKL, volumes: list[NDArray[np.float32]]) -> None:
    """Start at a linear autoencoder: latents are principal components of 4x4x4 blocks, interpolated on the way back.

    From random weights a short run ends below what four principal components give; from here it starts there. Residual
    branches begin quiet, so all that is left between the blocks and the latents is GroupNorm. It is made nearly the
    identity by a pair of channels at +-ANCHOR in a group, far above the signal: they fix the group's mean and scale,
    whatever the crop holds. The posterior's standard deviation is the constant LATENT_SIGMA: only the mean is cached.
    """
    mean, basis, spread = principal_blocks(volumes)
    encoder, decoder = model.encoder.blocks, model.decoder.blocks
    triangle = torch.tensor([0.25, 0.5, 0.25])
    smooth = torch.einsum("a,b,c->abc", triangle, triangle, triangle)
    for name, parameter in model.named_parameters():
        if name.endswith(("conv2.conv.weight", "conv2.conv.bias")):
            parameter.mul_(0.05)
        elif name.endswith("nin_shortcut.conv.weight"):
            n = min(parameter.shape[:2])
            parameter[:n] *= 0
            parameter[torch.arange(n), torch.arange(n), 0, 0, 0] = 1
    # 4x4x4 block -> 8 taps of a 2x2x2 block -> +-component j on channels 2j, 2j + 1.
    first, half, quarter = encoder[0].conv, encoder[3].conv.conv, encoder[6].conv.conv
    first.weight[0], first.bias[0] = 0, 0
    first.weight[0, 0, 1, 1, 1] = 1
    half.weight[:8], half.bias[:8] = 0, 0
    quarter.weight[:16], quarter.bias[:16] = 0, 0
    components = (basis / spread[:, None]).reshape(4, 2, 2, 2, 2, 2, 2)  # j, z2, z1, y2, y1, x2, x1
    for k, (z1, y1, x1) in enumerate(np.ndindex(2, 2, 2)):
        half.weight[k, 0, z1, y1, x1] = 1
        for j in range(4):
            part = components[j, :, z1, :, y1, :, x1]
            quarter.weight[2 * j, k, :2, :2, :2] = part
            quarter.weight[2 * j + 1, k, :2, :2, :2] = -part
    for j in range(4):
        offset = float((basis[j] / spread[j]).sum()) * mean
        quarter.bias[2 * j], quarter.bias[2 * j + 1] = -offset, offset
    scale = _anchor(encoder[8], signals=8)
    encoder[10].conv.weight.mul_(0.02)
    decoder[0].conv.weight[:8], decoder[0].conv.bias[:8] = 0, 0
    for quant in (model.quant_conv_mu.conv, model.post_quant_conv.conv):
        quant.weight[..., 0, 0, 0], quant.bias[:] = torch.eye(4), 0
    for j in range(4):
        for sign in (0, 1):
            encoder[10].conv.weight[j, 2 * j + sign, 1, 1, 1] = (0.5 - sign) * scale
            decoder[0].conv.weight[2 * j + sign, j, 1, 1, 1] = 1 - 2 * sign
    encoder[10].conv.bias[:] = 0
    for up in (decoder[3].postconv.conv, decoder[6].postconv.conv):
        up.weight[:8], up.bias[:8] = 0, 0
        for c in range(8):
            up.weight[c, c] = smooth
    scale = _anchor(decoder[8], signals=2)
    block_mean = float(basis[0].sum()) * float(spread[0]) / 64
    decoder[10].conv.weight.mul_(0.02)
    decoder[10].conv.weight[0, 0, 1, 1, 1] = 0.5 * scale * block_mean
    decoder[10].conv.weight[0, 1, 1, 1, 1] = -0.5 * scale * block_mean
    decoder[10].conv.bias[:] = mean
    log_variance = model.quant_conv_log_sigma.conv
    log_variance.weight[:], log_variance.bias[:] = 0, 2 * math.log(LATENT_SIGMA)


def _anchor(last_block: Any, signals: int) -> float:
    """Puts +-ANCHOR on the last two channels of every group; returns the first group's scale, given unit signals."""
    bias = last_block.conv2.conv.bias
    size = len(bias) // int(ARCHITECTURE["norm_num_groups"])
    bias[size - 2 :: size] = ANCHOR
    bias[size - 1 :: size] = -ANCHOR
    return float(math.sqrt((2 * ANCHOR**2 + signals) / size))


def principal_blocks(volumes: list[NDArray[np.float32]]) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean, four principal components (4, 64) and their standard deviations (4,) of 4x4x4 blocks of [0, 1] volumes."""
    rows = []
    for volume in volumes:
        d, h, w = (n // 4 for n in volume.shape)
        cut = volume[: 4 * d, : 4 * h, : 4 * w].reshape(d, 4, h, 4, w, 4)
        rows.append(cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 64))
    blocks = np.concatenate(rows)
    mean = float(blocks.mean())
    values, vectors = np.linalg.eigh(np.cov((blocks - mean).T))
    basis = torch.from_numpy(vectors[:, ::-1][:, :4].T.astype(np.float32).copy())
    return mean, basis, torch.from_numpy(np.sqrt(values[::-1][:4]).astype(np.float32).copy())
