"""Settings that would only fail late in a run, or silently do nothing, are refused before it begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from latentcache.errors import InputError

if TYPE_CHECKING:
    from diffusion.config import TrainConfig


def check(config: TrainConfig) -> None:
    """Refuse values that would only fail later, or silently do nothing.

    Raises:
        InputError: The value, what is expected, and the key to set.
    """
    multiple = config.model.in_plane_multiple
    crops = {"data.crop": config.data.crop}
    for key, crop in crops.items():
        if crop is not None and (crop < multiple or crop % multiple):
            raise InputError(
                f"{key} = {crop}",
                expected=f"a multiple of {multiple} latents, the U-Net's in-plane step",
                remedy=f"Use --set {key}={max(multiple, crop // multiple * multiple)}.",
            )
    at_least_one = {
        "data.batch_size": config.data.batch_size,
        "data.windows_per_volume": config.data.windows_per_volume,
        "data.window": 1 if config.data.window is None else config.data.window,
        "data.depth_bucket": config.data.depth_bucket,
        "optimiser.samples_per_step": config.optimiser.samples_per_step,
        "optimiser.epochs": config.optimiser.epochs,
        "losses.every": config.losses.every,
        "losses.slab": config.losses.slab,
        "budget.checkpoint_every_steps": config.budget.checkpoint_every_steps,
        "budget.log_every_steps": config.budget.log_every_steps,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise InputError(f"{key} = {value}", expected="1 or more", remedy=f"Use --set {key}=1 or a larger number.")
    if config.losses.perceptual_weight > 0 and not config.losses.vgg19_weights:
        raise InputError(
            f"losses.perceptual_weight = {config.losses.perceptual_weight} without VGG19 weights",
            expected="torchvision's VGG19 state dict (vgg19-*.pth)",
            remedy="Name the file with --set losses.vgg19_weights=FILE, or --set losses.perceptual_weight=0.",
        )


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuse bfloat16 on a CPU, where weight gradients of 3-D convolutions can be uninitialised memory.

    Raises:
        InputError: See infra/decisions/0011-bf16-on-cpu.md for the measurement.
    """
    if config.optimiser.precision == "bf16" and device.type == "cpu":
        raise InputError(
            "optimiser.precision = bf16 on a CPU",
            expected="fp32 there: in bfloat16 some weight gradients of 3-D convolutions are not computed at all",
            remedy="Use --set optimiser.precision=auto (bf16 on a GPU, fp32 on a CPU).",
        )
