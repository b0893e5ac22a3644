"""Fine-tune the decoder, or train the whole VAE, on volumes under the window that will be used.

MAISI was trained on -1000..1000 HU; a window of 400 HU asks five times the precision of it. Losses are those of latent
diffusion's first stage (Rombach et al., 2022, section 3.1): L1 and, late, squared error; KL; optionally a perceptual
distance and a patch discriminator with hinge loss (Isola et al., 2017; Esser et al., 2021).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from latentcache import InputError, NonFiniteError
from latentcache.storage import fresh_draft
from pipeline.vae.architecture import KlAutoencoder, VaeArchitecture
from pipeline.vae.weights import VaeWeights, load_weights

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Distance of two batches of slices (N, 1, H, W) in [-1, 1]: a scalar."""


@dataclass(frozen=True)
class VaeTrainConfig:
    """How the VAE is trained.

    Attributes:
        part: ``decoder`` keeps the encoder, and so every cached latent and encode key's meaning but the weights' hash;
            ``all`` trains both.
        crop_zyx: Voxels of a training crop, multiples of 4; in-plane wide, since GroupNorm sees the crop's statistics.
        final_phase: Share of the run, at its end, under squared error alone, which is what PSNR measures.
        discriminator_after: Share of the run after which the patch discriminator counts.
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
    ema_half_life: int = 200
    seed: int = 0
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


def random_crops(
    volumes: Iterator[NDArray[Any]], crop_zyx: tuple[int, int, int], seed: int, per_volume: int = 16, pool: int = 8
) -> Iterator[Tensor]:
    """Endless flipped crops (1, 1, d, h, w) in [0, 1] of an endless stream of volumes (D, H, W) in [-1, 1].

    A pool of volumes is held, and one replaced after ``per_volume`` crops. Volumes smaller than the crop are extended
    by their edge values.
    """
    rng = np.random.default_rng(seed)
    held: list[NDArray[Any]] = []
    while True:
        if len(held) < pool:
            held.append(next(volumes))
        else:
            held[int(rng.integers(pool))] = next(volumes)
        for _ in range(per_volume):
            volume = held[int(rng.integers(len(held)))]
            short = [max(0, least - n) for least, n in zip(crop_zyx, volume.shape, strict=True)]
            volume = np.pad(volume, [(0, n) for n in short], mode="edge") if any(short) else volume
            start = [int(rng.integers(n - c + 1)) for n, c in zip(volume.shape, crop_zyx, strict=True)]
            crop = volume[tuple(slice(o, o + c) for o, c in zip(start, crop_zyx, strict=True))]
            flipped = crop[tuple(slice(None, None, int(rng.choice([-1, 1]))) for _ in range(3))]
            yield torch.from_numpy(np.ascontiguousarray(flipped, dtype=np.float32) * 0.5 + 0.5)[None, None]


def train_vae(
    config: VaeTrainConfig,
    crops: Iterator[Tensor],
    out: Path,
    *,
    start: Path | None = None,
    device: torch.device | str = "cpu",
    perceptual: Perceptual | None = None,
    on_step: Callable[[int, dict[str, float]], None] = lambda *_: None,
) -> VaeWeights:
    """Train and write ``out`` (safetensors that `vae.load_vae` reads); returns the weights as loaded back.

    Args:
        start: Weights to start from; their architecture then replaces the configuration's.
        perceptual: Needed where ``perceptual_weight`` is positive.

    Raises:
        InputError: A decoder alone without weights to start from; a perceptual weight without its network.
        NonFiniteError: The loss is not finite; names the step.
    """
    if config.part == "decoder" and start is None:
        raise InputError("a decoder to tune and no weights", expected="--vae PATH", remedy="Or use --preset tiny.")
    if config.perceptual_weight > 0 and perceptual is None:
        raise InputError(
            "a perceptual weight and no perceptual network", expected="VGG19 weights", remedy="Give --vgg PATH."
        )
    torch.manual_seed(config.seed)
    network = _network(config, start).to(device)
    trained = _trained(network, config.part)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    judge = PatchDiscriminator().to(device) if config.discriminator_weight > 0 else None
    judge_optimizer = torch.optim.AdamW(judge.parameters(), lr=config.learning_rate) if judge is not None else None
    keep = 0.5 ** (1 / config.ema_half_life)
    for step in range(config.steps):
        progress = step / config.steps
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (step + 1) / config.warmup) * math.cos(progress * math.pi / 2)
        x = next(crops).to(device)
        judging = judge if progress >= config.discriminator_after and progress < 1 - config.final_phase else None
        image, loss, terms = _losses(network, x, progress, config, perceptual, judging)
        if not math.isfinite(terms["loss"]):
            raise NonFiniteError(
                f"a loss of {terms['loss']} at step {step}", expected="a number", remedy="Lower --learning-rate."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        # GroupNorm of a nearly constant crop has a gradient without bound: such a step is left out.
        if torch.isfinite(nn.utils.clip_grad_norm_(trained, 1.0)):
            optimizer.step()
        if judging is not None and judge_optimizer is not None:
            terms["judge"] = _judge_step(judging, judge_optimizer, x, image.detach())
        with torch.no_grad():
            weight = 1 - min(keep, (1 + step) / (10 + step))
            for target, source in zip(average.parameters(), network.parameters(), strict=True):
                target.lerp_(source, weight)
        on_step(step, terms)
    return save_weights(average, out, {"recipe": json.dumps(_facts(config), sort_keys=True)})


def save_weights(network: KlAutoencoder, out: Path, metadata: dict[str, str]) -> VaeWeights:
    """Write float32 safetensors with the architecture in the metadata, aside and renamed; read them back."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = fresh_draft(out.with_suffix(".partial"))
    save_file(tensors, aside, metadata={"architecture": json.dumps(network.architecture.to_dict()), **metadata})
    aside.replace(out)
    return load_weights(out)


def _network(config: VaeTrainConfig, start: Path | None) -> KlAutoencoder:
    if start is not None:
        return load_weights(start).build()
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


def _trained(network: KlAutoencoder, part: str) -> list[nn.Parameter]:
    """Switch gradients on for a part; returns its parameters."""
    modules = [network] if part == "all" else [network.post_quant_conv, network.decoder]
    network.requires_grad_(False)
    for module in modules:
        module.requires_grad_(True)
    return [p for p in network.parameters() if p.requires_grad]


def _losses(
    network: KlAutoencoder,
    x: Tensor,
    progress: float,
    config: VaeTrainConfig,
    perceptual: Perceptual | None,
    judge: nn.Module | None,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The reconstruction, the loss and its terms for a crop (1, 1, d, h, w) in [0, 1]."""
    device = x.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        mean, log_variance = network.encode(x)
        image = network.decode(mean + torch.exp(log_variance / 2) * torch.randn_like(mean)).float()
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
    if judge is not None:
        terms["adversarial"] = -judge(image).mean()
        loss = loss + config.discriminator_weight * terms["adversarial"]
    return image, loss, {name: float(t.detach()) for name, t in {**terms, "loss": loss}.items()}


def _judge_step(judge: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, made: Tensor) -> float:
    """One hinge step of the discriminator; returns its loss."""
    loss = F.relu(1 - judge(real)).mean() + F.relu(1 + judge(made)).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def _facts(config: VaeTrainConfig) -> dict[str, Any]:
    return {**asdict(config), "architecture": config.architecture.to_dict()}
