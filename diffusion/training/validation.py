"""Validation: the loss on the held-out split with fixed windows and noise and, now and then, sampled pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from diffusion.config import ValidationConfig
from diffusion.data import PairStream
from diffusion.networks import UNet, build_unet, informed
from diffusion.objectives import LossTerms, Objective
from diffusion.runs import RunCard, full_tensor, is_fsdp
from diffusion.sampling import Interpolator
from diffusion.training.distributed import World
from diffusion.training.loop import to_device

OF_LATENTS = ("val_loss", "val_rms_hu")
"""Figures that every validation gives, without a decoder."""
ValidateImages = Callable[[Interpolator, int], dict[str, float]]
"""(model with averaged weights, step) to figures over held-out pairs, decoded to HU by whoever hands this in."""


def generators(seeds: list[int], device: torch.device) -> list[torch.Generator]:
    """One generator a sample."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def validation(
    held_out: PairStream,
    objective: Objective,
    card: RunCard,
    settings: ValidationConfig,
    images: ValidateImages | None,
    world: World,
    steps_per_epoch: int,
) -> Callable[[nn.Module, int], dict[str, float]]:
    """The latent loss over the validation split with fixed windows and noise and, now and then, decoded pairs.

    Where the run card holds the decoder's power by channel, ``val_rms_hu`` is the predicted clean latents' error as the
    image shows it, at the noise levels of training.

    Args:
        settings: The metric is one that ``chosen_metric`` gave.
    """
    power = card.extra.get("hu2_per_unit_by_channel")
    steps_per_validation = steps_per_epoch * settings.every_epochs

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        total = torch.zeros(3, dtype=torch.float64, device=world.device)
        for read in held_out.fixed_batches(settings.max_batches):
            batch = to_device(read, world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=world.device.type == "cuda"):
                terms = objective.loss(
                    informed(module, batch.get("told")),
                    batch["thin"],
                    batch["condition"],
                    batch["mask"],
                    generators(batch["noise_seed"], world.device),
                )
            seen = torch.zeros_like(terms.per_sample) if power is None else squared_hu(terms, batch, power)
            each = torch.stack([terms.per_sample, seen, torch.ones_like(seen)])
            total += (each * batch["weight"]).sum(dim=1)
        loss, squared, count = world.sum(total).tolist()
        figures = {"val_loss": loss / count}
        if power is not None:
            figures["val_rms_hu"] = math.sqrt(squared / count)
        turn = step // steps_per_validation
        wanted = settings.metric not in OF_LATENTS or (settings.images_every > 0 and turn % settings.images_every == 0)
        if images is not None and wanted:
            figures |= on_first_rank(
                lambda unet: images(interpolator(unet, objective, card), step), module, card, world
            )
        return figures

    return validate


def chosen_metric(settings: ValidationConfig, card: RunCard, images: ValidateImages | None) -> str:
    """Return the metric of ``best`` where the configuration leaves it open: the nearest thing to an image at hand."""
    if settings.metric != "auto":
        return settings.metric
    if images is not None:
        return "val_psnr_db"
    return "val_loss" if card.extra.get("hu2_per_unit_by_channel") is None else "val_rms_hu"


def squared_hu(terms: LossTerms, batch: dict[str, Any], power: list[float]) -> Tensor:
    """(B,) HU² of each sample's predicted clean latent: its squared error, each channel as the decoder shows it."""
    weights = torch.tensor(power, device=batch["mask"].device).reshape(1, -1, 1, 1, 1)
    squared: Tensor = (terms.predicted_clean - batch["thin"]).square() * weights * batch["mask"]
    valid: Tensor = batch["mask"].flatten(1).sum(1).clamp(min=1.0)
    return squared.flatten(1).sum(1) / valid


def interpolator(unet: UNet, objective: Objective, card: RunCard) -> Interpolator:
    """The model in training as generation uses it."""
    return Interpolator.from_parts(
        unet,
        objective,
        card.whitening["mean"],
        card.whitening["std"],
        encode_key=card.encode_key,
        encoding=card.build_encoding(),
        alignment=card.alignment,
        depth_window=card.depth_window,
        refiner_sha256=card.refiner_sha256,
        card=card,
    )


def on_first_rank(
    figures_of: Callable[[UNet], dict[str, float]], module: nn.Module, card: RunCard, world: World
) -> dict[str, float]:
    """Figures that one rank computes on a whole model while the others wait; all return them."""
    weights = whole_weights(module, world) if is_fsdp(module) else None
    found: list[Any] = [None]
    if world.rank == 0:
        unet = module
        if weights is not None:
            unet = build_unet(card.unet_config).to(world.device).eval()
            unet.load_state_dict(weights)
        assert isinstance(unet, UNet)
        found = [figures_of(unet)]
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    result: dict[str, float] = found[0]
    return result


def whole_weights(module: nn.Module, world: World) -> dict[str, Tensor]:
    """Return a sharded module's weights by name, whole, on the first rank; nothing on the others.

    Those take part in gathering a tensor at a time and keep none (2.4 GB per GPU for the preset ``medium``).
    """
    weights: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        whole = full_tensor(tensor)
        if world.rank == 0:
            weights[name] = whole
    return weights
