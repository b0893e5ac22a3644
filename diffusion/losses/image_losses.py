"""Image losses on a decoded latent slab: MS-SSIM, VGG19 distance and L2, prediction and target decoded alike.

A slab's GroupNorm statistics in the decoder differ from the whole volume's, so a decoded slab is compared only with
the target's decoded slab, never with the volume's voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.losses.ms_ssim import ms_ssim
from diffusion.losses.vgg import VGG19Features, perceptual_distance
from latentcache import InputError

Decoder = Callable[[Tensor], Tensor]
"""Raw latents (B, 4, d, h, w) to images (B, 1, 4d, 4h, 4w) in [-1, 1], differentiable, frozen."""


@dataclass(frozen=True)
class ImageTerms:
    """Weighted image loss of each sample, and its parts before weighting; (B,) float32 each.

    ``used`` (B,) bool: False where the sample's predicted latent was meaningless and its terms are zero.
    """

    per_sample: Tensor
    ms_ssim: Tensor
    perceptual: Tensor
    l2: Tensor
    used: Tensor


@dataclass(frozen=True)
class DecodedPart:
    """The part of a latent that the image losses decode, and the slices that VGG19 looks at.

    Attributes:
        slab: Latent slices decoded.
        crop: In-plane side in latents; None decodes the whole plane.
        slice_fraction: Share of the slab's decoded slices that VGG19 looks at, at least one.
    """

    slab: int = 4
    crop: int | None = None
    slice_fraction: float = 0.2


class ImageLosses:
    """Image losses of a predicted clean latent.

    Args:
        decoder: The frozen VAE's decoder, handed in by whoever knows the VAE.
        mean, std: Whitening of the latents, a number a channel.
        ms_ssim_weight, perceptual_weight, l2_weight: Zero switches a term off.
        vgg: Needed where ``perceptual_weight`` is positive; see :func:`diffusion.losses.vgg.load_vgg19`.
        part: The part of each latent that is decoded and looked at.
    """

    def __init__(
        self,
        decoder: Decoder,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        ms_ssim_weight: float = 0.1,
        perceptual_weight: float = 0.1,
        l2_weight: float = 0.0,
        vgg: VGG19Features | None = None,
        part: DecodedPart = DecodedPart(),
    ) -> None:
        if perceptual_weight > 0 and vgg is None:
            raise InputError(
                "a perceptual weight above 0 without VGG19",
                expected="VGG19 features",
                remedy="Load them with load_vgg19, or set the perceptual weight to 0.",
            )
        slice_fraction, slab, crop = part.slice_fraction, part.slab, part.crop
        if not (0 < slice_fraction <= 1 and slab >= 1 and (crop is None or crop >= 4)):
            raise InputError(
                f"image losses on {slice_fraction} of the slices of a slab of {slab} latents, crop {crop}",
                expected="a fraction in (0, 1], a slab of at least 1 and a crop of at least 4 latents",
                remedy="The defaults are 0.2, 4 and the whole plane.",
            )
        self.decoder = decoder
        self.mean, self.std = list(mean), list(std)
        self.ms_ssim_weight, self.perceptual_weight, self.l2_weight = ms_ssim_weight, perceptual_weight, l2_weight
        self.vgg = vgg
        self.slice_fraction, self.slab, self.crop = slice_fraction, slab, crop

    def __call__(
        self,
        predicted_BCDHW: Tensor,
        clean_BCDHW: Tensor,
        mask_B1DHW: Tensor,
        meaningful_B: Tensor,
        generators: Sequence[torch.Generator],
    ) -> ImageTerms:
        """The terms of each sample; the gradient reaches the prediction alone.

        Args:
            predicted_BCDHW, clean_BCDHW: Whitened latents, as in :class:`diffusion.objectives.bridge.LossTerms`.
            mask_B1DHW: 1 where latents are valid; elsewhere the target replaces the prediction.
            meaningful_B: Samples to look at.
            generators: One a sample: chooses its slab, crop and slices, so that batch mates do not matter.
        """
        zero = predicted_BCDHW.new_zeros((), dtype=torch.float32)
        similarity, distance, squared, weighted = [], [], [], []
        for b, generator in enumerate(generators):
            s = d = q = zero
            if bool(meaningful_B[b]):
                s, d, q = self._terms(predicted_BCDHW[b], clean_BCDHW[b], mask_B1DHW[b], generator)
            similarity.append(s)
            distance.append(d)
            squared.append(q)
            weighted.append(self.ms_ssim_weight * s + self.perceptual_weight * d + self.l2_weight * q)
        total, one_minus_ms_ssim, vgg, l2 = (torch.stack(p) for p in (weighted, similarity, distance, squared))
        return ImageTerms(total, one_minus_ms_ssim, vgg, l2, meaningful_B)

    def _terms(
        self, predicted: Tensor, clean: Tensor, mask: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """1 - MS-SSIM, the VGG19 distance and the squared error of one sample's slab; scalars."""
        part = (slice(None), *self._place(clean.shape[1:], generator))
        target = clean[part].float().detach()
        prediction = torch.where(mask[part] > 0, predicted[part].float(), target)
        with torch.no_grad():
            wanted = self._decode(target)
        image = self._decode(prediction)
        similarity = distance = squared = prediction.new_zeros(())
        if self.l2_weight > 0:
            # What is clipped on both sides is right, however far beyond the window the decoder put it.
            squared = (image.clamp(-1, 1) - wanted.clamp(-1, 1)).square().mean()
        if self.ms_ssim_weight > 0:
            similarity = 1 - ms_ssim(image, wanted, data_range=2.0).mean()
        if self.perceptual_weight > 0:
            assert self.vgg is not None
            count = max(1, math.ceil(self.slice_fraction * len(image) - 1e-9))
            chosen = torch.randperm(len(image), generator=generator, device=generator.device)[:count].to(image.device)
            distance = perceptual_distance(self.vgg, image[chosen], wanted[chosen]).mean()
        return similarity, distance, squared

    def _place(self, shape_dhw: Sequence[int], generator: torch.Generator) -> tuple[slice, slice, slice]:
        """A random slab and crop."""
        crop = max(shape_dhw) if self.crop is None else self.crop
        parts = []
        for size, wanted in zip(shape_dhw, (self.slab, crop, crop), strict=True):
            length = min(size, wanted)
            start = int(torch.randint(size - length + 1, (), generator=generator, device=generator.device))
            parts.append(slice(start, start + length))
        return parts[0], parts[1], parts[2]

    def _decode(self, whitened_CDHW: Tensor) -> Tensor:
        """Decoded slices (4d, 4h, 4w) in float32."""
        shape = (-1, 1, 1, 1)
        std = torch.tensor(self.std, device=whitened_CDHW.device).reshape(shape)
        mean = torch.tensor(self.mean, device=whitened_CDHW.device).reshape(shape)
        return self.decoder((whitened_CDHW * std + mean)[None])[0, 0].float()
