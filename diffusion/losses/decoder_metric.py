"""Effect of a latent's error in the image: its power in the image by channel, from the Jacobian.

Whitened channels look alike to a squared error, and are not: of one tiny VAE the first channel's error is seen 25 times
as much as the next one's. The decoder itself says so, and is asked at the start of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffusion.losses.image_losses import Decoder
from latentcache import COMPRESSION, NonFiniteError

IN_RANGE = 1.0
"""Decoded values beyond this are clipped by whoever uses them: an error there changes nothing."""


def channel_power(
    decoder: Decoder,
    latents: Iterable[Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    hu_per_unit: float,
    probes: int = 1,
    seed: int = 0,
) -> list[float]:
    """HU² that one unit of squared whitened error causes in the image, by channel, the mean over the latents' voxels.

    Hutchinson probes: for signs u that are independent in every voxel, E (Jᵀu)_i² is the sum over voxels of J_vi², the
    i-th diagonal entry of JᵀJ (Bekas et al. 2007, section 2). One backward pass gives it for every latent at once.
    Voxels that are clipped take no part. Calls of the decoder keep their own statistics, so use slabs that are large
    enough to be representative.

    Args:
        decoder: Raw latents (B, C, d, h, w) to images (B, 1, 4d, 4h, 4w) in [-1, 1], differentiable.
        latents: Whitened training latents (C, d, h, w).
        mean, std: The whitening, a number a channel.
        hu_per_unit: HU of one unit of the image: half the window's width.
        probes: Sign tensors a latent.

    Raises:
        NonFiniteError: A probe is NaN or infinite.
    """
    total, count = torch.zeros(len(mean), dtype=torch.float64), 0
    generator = torch.Generator().manual_seed(seed)
    for number, latent in enumerate(latents):
        shape = (-1, 1, 1, 1)
        scale, offset = (torch.tensor(values, device=latent.device).reshape(shape) for values in (std, mean))
        for _ in range(probes):
            with torch.enable_grad():
                whitened = latent.detach().float().requires_grad_(True)
                image = decoder((whitened * scale + offset)[None]).float()
                signs = torch.randint(0, 2, image.shape, generator=generator).to(image.device) * 2.0 - 1.0
                signs = signs * (image.detach().abs() < IN_RANGE)
                (found,) = torch.autograd.grad(image, whitened, signs)
            if not bool(torch.isfinite(found).all()):
                raise NonFiniteError(
                    f"a probe of the decoder's Jacobian at training latent {number} is NaN or infinite",
                    expected="a decoder with finite derivatives at every training latent",
                    remedy="Check the VAE's weights (`ctpipe vae-check STORE`), or train with losses.measure=latent.",
                )
            total += found.double().square().mean(dim=(1, 2, 3)).cpu()
            count += 1
    power = total / max(count, 1) / COMPRESSION**3 * hu_per_unit**2
    return [float(f"{value:.4g}") for value in power.tolist()]
