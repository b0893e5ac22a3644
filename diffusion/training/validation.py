"""Validation: the loss on the held-out split with fixed windows and noise and, now and then, sampled pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diffusion.config import TrainConfig
from diffusion.data import PairStream
from diffusion.networks import UNet, build_unet
from diffusion.objectives import Objective
from diffusion.runs import RunCard
from diffusion.sampling import Interpolator
from diffusion.training.distributed import World
from diffusion.training.loop import to_device

ValidateImages = Callable[[Interpolator, int], dict[str, float]]
"""(model with averaged weights, step) to figures over held-out pairs, decoded to HU by whoever hands this in."""


def generators(seeds: list[int], device: torch.device) -> list[torch.Generator]:
    """One generator a sample."""
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def validation(
    held_out: PairStream,
    objective: Objective,
    card: RunCard,
    config: TrainConfig,
    images: ValidateImages | None,
    world: World,
    steps_per_epoch: int,
) -> Callable[[nn.Module, int], dict[str, float]]:
    """The latent loss over the validation split with fixed windows and noise and, now and then, decoded pairs."""
    settings = config.validation
    steps_per_validation = steps_per_epoch * settings.every_epochs

    @torch.no_grad()
    def validate(module: nn.Module, step: int) -> dict[str, float]:
        total = torch.zeros(2, dtype=torch.float64, device=world.device)
        for read in held_out.fixed_batches(settings.max_batches):
            batch = to_device(read, world.device)
            with torch.autocast(world.device.type, torch.bfloat16, enabled=world.device.type == "cuda"):
                terms = objective.loss(
                    module,
                    batch["thin"],
                    batch["condition"],
                    batch["mask"],
                    generators(batch["noise_seed"], world.device),
                )
            total += torch.stack([(terms.per_sample * batch["weight"]).sum(), batch["weight"].sum()])
        loss, count = world.sum(total).tolist()
        figures = {"val_loss": loss / count}
        turn = step // steps_per_validation
        wanted = settings.metric != "val_loss" or (settings.images_every > 0 and turn % settings.images_every == 0)
        if images is not None and wanted:
            figures |= on_first_rank(
                lambda unet: images(interpolator(unet, objective, card), step), module, card, world
            )
        return figures

    return validate


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
        card=card,
    )


def on_first_rank(
    figures_of: Callable[[UNet], dict[str, float]], module: nn.Module, card: RunCard, world: World
) -> dict[str, float]:
    """Figures that one rank computes on a whole model while the others wait; all return them."""
    weights = None
    if isinstance(module, FSDPModule):
        weights = {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in module.state_dict().items()}
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
