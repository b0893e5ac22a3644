"""Fine-tune the decoder, or train the whole VAE, on volumes under the window that will be used.

MAISI was trained on -1000..1000 HU; a window of 400 HU asks five times the precision of it. Losses are those of latent
diffusion's first stage (Rombach et al., 2022, section 3.1): L1 and, late, squared error; KL; optionally a perceptual
distance and a patch discriminator with hinge loss (Isola et al., 2017; Esser et al., 2021).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from latentcache import InputError, compute_dtype
from latentcache.storage import written_aside
from pipeline.vae.architecture import KlAutoencoder, VaeArchitecture
from pipeline.vae.weights import VaeWeights, load_weights

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distance of two batches of slices (N, 1, H, W) in [-1, 1]: a scalar."""


@dataclass(frozen=True)
class VaeTrainConfig:
    """Settings of the VAE's training.

    Attributes:
        part: ``decoder`` keeps the encoder, and so every cached latent and its encode key; ``all`` trains both.
        crop_zyx: Voxels of a training crop, multiples of 4; in-plane wide, since GroupNorm sees the crop's statistics.
        final_phase: Share of the run, at its end, under squared error alone, which is what PSNR measures.
        discriminator_after: Share of the run after which the patch discriminator counts.
        ema_std: Relative width of the averaged weights' profile; see `diffusion.runs.PowerEma`.
        precision: ``auto`` is bf16 autocast on a GPU and fp32 on a CPU, ``fp32`` and ``bf16`` are those.
        validate_every: Steps between looks at the validation volumes; ``validation_crops`` are looked at.
    """

    part: Literal["decoder", "all"] = "decoder"
    steps: int = 2000
    learning_rate: float = 5e-5
    warmup: int = 50
    crop_zyx: tuple[int, int, int] = (16, 128, 128)
    kl_weight: float = 1e-6
    mse_weight: float = 4.0
    perceptual_weight: float = 0.0
    discriminator_weight: float = 0.0
    discriminator_after: float = 0.3
    final_phase: float = 0.2
    ema_std: float = 0.05
    validate_every: int = 200
    validation_crops: int = 16
    seed: int = 0
    precision: str = "auto"
    architecture: VaeArchitecture = field(default_factory=VaeArchitecture)

    def __post_init__(self) -> None:
        if any(n <= 0 or n % self.architecture.compression for n in self.crop_zyx) or self.steps < 1:
            raise InputError(
                f"crop {self.crop_zyx} and {self.steps} steps",
                expected=f"lengths that are multiples of {self.architecture.compression}, at least one step",
                remedy="For example --crop 16,128,128 --steps 2000.",
            )


PRESETS = {
    "decoder": VaeTrainConfig(),
    "all": VaeTrainConfig(part="all", learning_rate=2e-5, steps=10_000),
    "tiny": VaeTrainConfig(
        part="all",
        steps=3000,
        learning_rate=1.2e-3,
        kl_weight=2e-4,
        crop_zyx=(8, 96, 96),
        final_phase=0.35,
        architecture=VaeArchitecture(channels=(16, 32, 64), norm_num_groups=8),
    ),
}


class PatchDiscriminator(nn.Sequential):
    """Judges overlapping patches: three strided 3-D convolutions, then a score map."""

    def __init__(self, width: int = 32) -> None:
        layers: list[nn.Module] = [nn.Conv3d(1, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(2):
            wide = width * 2**i
            layers += [nn.Conv3d(wide, 2 * wide, (3, 4, 4), (1, 2, 2), 1), nn.GroupNorm(8, 2 * wide), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv3d(4 * width, 1, 3, 1, 1))


class CropSource:
    """Flipped crops of a sequence of volumes; each follows from its number alone, so that a run can go on anywhere.

    Crop ``n`` is cut from one of the ``pool`` volumes that end at volume ``n // per_volume``. Crops without contrast
    (air, or what the window clips to one value) are drawn anew: GroupNorm has no bounded gradient there.

    Args:
        volume_of: A volume's name and its (D, H, W) intensities in [-1, 1], by number. Volumes smaller than the crop
            are extended by their edge values.
    """

    def __init__(
        self,
        volume_of: Callable[[int], tuple[str, NDArray[Any]]],
        crop_zyx: tuple[int, int, int],
        seed: int,
        per_volume: int = 16,
        pool: int = 8,
    ) -> None:
        self.volume_of, self.crop_zyx, self.seed = volume_of, crop_zyx, seed
        self.per_volume, self.pool = per_volume, pool
        self._held: dict[int, tuple[str, NDArray[Any]]] = {}

    def crop(self, number: int) -> tuple[str, Tensor]:
        """Return the volume's name and the crop (1, d, h, w) in [0, 1].

        Raises:
            InputError: Volumes of one intensity.
        """
        newest = number // self.per_volume
        wanted = range(max(0, newest - self.pool + 1), newest + 1)
        self._held = {n: self._held[n] if n in self._held else self.volume_of(n) for n in wanted}
        rng = np.random.default_rng((self.seed, number))
        for _ in range(MOST_DRAWS):
            name, volume = self._held[int(rng.choice(wanted))]
            short = [max(0, least - n) for least, n in zip(self.crop_zyx, volume.shape, strict=True)]
            volume = np.pad(volume, [(0, n) for n in short], mode="edge") if any(short) else volume
            start = [int(rng.integers(n - c + 1)) for n, c in zip(volume.shape, self.crop_zyx, strict=True)]
            crop = volume[tuple(slice(o, o + c) for o, c in zip(start, self.crop_zyx, strict=True))]
            flipped = crop[tuple(slice(None, None, int(rng.choice([-1, 1]))) for _ in range(3))]
            unit = np.ascontiguousarray(flipped, dtype=np.float32) * 0.5 + 0.5
            if not float(unit.std()) < LEAST_CONTRAST:  # NaN passes, and stops the run at its step
                return name, torch.from_numpy(unit)[None]
        raise InputError(
            f"{MOST_DRAWS} crops in a row without contrast, from {len(wanted)} volumes",
            expected="volumes with structure under the window",
            remedy="Check the window, or take larger crops with --crop.",
        )


MOST_DRAWS = 100
LEAST_CONTRAST = 0.005
"""Standard deviation of a crop in [0, 1]: 2 HU under a window of 400 HU."""


class VaeInTraining(nn.Module):
    """The autoencoder and, where there is one, its discriminator: one module, so that both are in every checkpoint.

    Gradients are on for the part that is trained.

    Args:
        start: Weights to start from; their architecture then replaces the configuration's.

    Raises:
        InputError: A decoder alone without weights to start from.
    """

    def __init__(self, config: VaeTrainConfig, start: VaeWeights | None = None) -> None:
        super().__init__()
        if config.part == "decoder" and start is None:
            raise InputError("a decoder to tune and no weights", expected="--vae PATH", remedy="Or use --preset tiny.")
        self.network = _fresh_network(config) if start is None else start.build()
        self.network.requires_grad_(config.part == "all")
        for module in (self.network.post_quant_conv, self.network.decoder):
            module.requires_grad_(True)
        self.judge = PatchDiscriminator() if config.discriminator_weight > 0 else None


def reconstruction_losses(
    module: VaeInTraining,
    x: Tensor,
    noise: Tensor,
    progress: float,
    config: VaeTrainConfig,
    perceptual: Perceptual | None,
) -> dict[str, Tensor]:
    """Return the loss of one crop and its summands, as scalars; ``loss`` is what is minimised.

    The discriminator's own hinge loss is one summand: it sees a detached reconstruction, and the reconstruction sees
    the discriminator with its weights held, so that one backward pass serves both.

    Args:
        x: (1, 1, d, h, w) in [0, 1].
        noise: Standard normal, of the posterior's shape.
        progress: Share of the run that is done.
    """
    device = x.device.type
    with torch.autocast(device, torch.bfloat16, enabled=compute_dtype(config.precision, device) == "bfloat16"):
        mean, log_variance = module.network.encode(x)
        image = module.network.decode(mean + torch.exp(log_variance / 2) * noise).float()
    l1, mse = (image - x).abs().mean(), (image - x).square().mean()
    final = progress >= 1 - config.final_phase
    terms = {"l1": l1, "mse": mse}
    loss = 12 * mse if final else l1 + config.mse_weight * mse
    if config.part == "all":
        terms["kl"] = 0.5 * (mean.float().square() + log_variance.float().exp() - 1 - log_variance.float()).mean()
        loss = loss + config.kl_weight * terms["kl"]
    if perceptual is not None and config.perceptual_weight > 0 and not final:
        ours, theirs = (t[0].transpose(0, 1) * 2 - 1 for t in (image, x))
        terms["perceptual"] = perceptual(ours, theirs)
        loss = loss + config.perceptual_weight * terms["perceptual"]
    if module.judge is not None and progress >= config.discriminator_after and not final:
        held = {name: parameter.detach() for name, parameter in module.judge.named_parameters()}
        terms["adversarial"] = -functional_call(module.judge, held, (image,)).mean()
        terms["judge"] = F.relu(1 - module.judge(x)).mean() + F.relu(1 + module.judge(image.detach())).mean()
        loss = loss + config.discriminator_weight * terms["adversarial"] + terms["judge"]
    return {**terms, "loss": loss}


def save_weights(
    state: Mapping[str, Tensor], architecture: VaeArchitecture, out: Path, metadata: Mapping[str, str]
) -> VaeWeights:
    """Write float32 safetensors with the architecture in the metadata, whole or not at all; read them back."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    with written_aside(out) as draft:
        save_file(tensors, draft, metadata={"architecture": json.dumps(architecture.to_dict()), **metadata})
    return load_weights(out)


def _fresh_network(config: VaeTrainConfig) -> KlAutoencoder:
    network = KlAutoencoder(config.architecture)
    with torch.no_grad():  # near a linear network at first: quiet residual branches, mid-grey, a narrow posterior
        for name, parameter in network.named_parameters():
            if name.endswith("conv2.weight"):
                parameter.mul_(0.05)
        list(network.decoder.parameters())[-1].fill_(0.4)
        network.quant_conv_log_sigma.weight.zero_()
        assert network.quant_conv_log_sigma.bias is not None
        network.quant_conv_log_sigma.bias.fill_(-6.0)
    return network
