"""Needs of a training step before it runs: arithmetic, memory and disk, counted on shapes without allocating any."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion.networks import Stage, UNetConfig, assume_fused, build_unet
from diffusion.training.distributed import World
from latentcache import InputError, free_host_bytes, held_by_others

if TYPE_CHECKING:
    from diffusion.config import TrainConfig
    from diffusion.losses import Decoder


WORKSPACE = 1.15
"""Allocator slack and convolution workspaces over what is counted."""


@dataclass(frozen=True)
class StepEstimate:
    """Needs of one rank.

    Attributes:
        forward_flops_per_sample: Floating point operations of one forward pass (a multiply-add is two).
        state_bytes: Weights, gradients, AdamW's two moments and the average, as far as this rank keeps them.
        activation_bytes: What the forward pass keeps for the backward pass, one micro-batch.
        image_bytes: What the image losses keep beside it, every sample of the micro-batch its decoded slab.
        exchange_bytes: What the exchange between ranks holds: DDP's buckets, or the whole gradients that FSDP2 sums up
            over accumulated batches before it shards them.
        peak_bytes: All of it and slack.
        checkpoint_bytes: One checkpoint on disk.
    """

    parameters: int
    forward_flops_per_sample: float
    state_bytes: int
    activation_bytes: int
    image_bytes: int
    exchange_bytes: int
    peak_bytes: int
    checkpoint_bytes: int


def estimate_step(
    config: TrainConfig, shape_dhw: tuple[int, int, int], world: World, decoder: Decoder | None = None
) -> StepEstimate:
    """Count a training step of the configured model on samples of one latent shape.

    Args:
        decoder: The VAE's decoder where image losses are configured; it is run on shapes alone.
    """
    settings = config.optimiser
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and world.device.type == "cuda")
    with_average = settings.ema_std > 0
    parameters, flops, saved, stage = count_forward(
        config.model, config.data.batch_size, shape_dhw, bf16, fused=world.device.type == "cuda"
    )
    sharers = world.size if config.parallel.strategy == "fsdp" else 1
    state = parameters * 4 * (5 if with_average else 4) // sharers
    activations = saved + (stage if config.model.activation_checkpointing else 0)
    images = count_image_losses(config, shape_dhw, decoder) * config.data.batch_size if decoder else 0
    exchange = exchange_bytes(config, parameters, world)
    casts = parameters * 2 if bf16 else 0
    # Validation and checkpoints exchange or copy a tensor at a time; a step's own peak is above theirs.
    peak = int((state + activations + images + exchange + casts) * WORKSPACE)
    return StepEstimate(
        parameters,
        flops / config.data.batch_size,
        state,
        activations,
        images,
        exchange,
        peak,
        parameters * 4 * (4 if with_average else 3),
    )


def exchange_bytes(config: TrainConfig, parameters: int, world: World) -> int:
    """Bytes of gradients that are held twice for the sake of the other ranks."""
    if world.size == 1:
        return 0
    if config.parallel.strategy == "ddp":
        return parameters * 4
    accumulated = config.optimiser.samples_per_step > config.data.batch_size * world.size
    return parameters * 4 if accumulated else 0


def count_image_losses(config: TrainConfig, shape_dhw: tuple[int, int, int], decoder: Decoder) -> int:
    """Return the bytes that one sample's image losses keep for the backward pass.

    The decoder's activations on a slab, those of VGG19 on the slices that it looks at, and those of MS-SSIM.
    """
    # Here, so that counting the U-Net needs torch alone (infra/bench/unet_gpu.py).
    from diffusion.losses import VGG19Features, ms_ssim, perceptual_distance

    losses = config.losses
    if losses.ms_ssim_weight == 0 and losses.perceptual_weight == 0:
        return 0
    depth, height, width = shape_dhw
    side = max(height, width) if losses.crop is None else losses.crop
    slab = (min(losses.slab, depth), min(side, height), min(side, width))
    with (
        warnings.catch_warnings(),
        FakeTensorMode(allow_non_fake_inputs=True),
        saved_bytes(nn.Identity()) as kept,
    ):
        warnings.simplefilter("ignore")
        latents = torch.zeros(1, config.model.latent_channels, *slab, requires_grad=True)
        image = decoder(latents)[0, 0].float()
        wanted = torch.zeros_like(image)
        if losses.ms_ssim_weight > 0:
            ms_ssim(image, wanted, data_range=2.0)
        if losses.perceptual_weight > 0:
            seen = max(1, math.ceil(losses.slice_fraction * len(image) - 1e-9))
            perceptual_distance(VGG19Features(), image[:seen], wanted[:seen])
    return sum(kept.values())


@lru_cache(maxsize=32)
def count_forward(
    model: UNetConfig, batch: int, shape_dhw: tuple[int, int, int], bf16: bool, *, fused: bool = False
) -> tuple[int, float, int, int]:
    """Return parameters, forward operations, bytes kept for the backward pass, and the largest block's share of them.

    The share is of blocks that are recomputed: it is needed while that block's backward pass runs.

    Args:
        fused: Count what is kept where the Triton kernels run, as they do on a GPU: a normalised activation less a
            layer.
    """
    with warnings.catch_warnings(), FakeTensorMode(), assume_fused(fused):
        # A fused kernel's absence is no concern of a run on shapes alone.
        warnings.simplefilter("ignore")
        net = build_unet(model)
        parameters = sum(p.numel() for p in net.parameters())
        x = torch.zeros(batch, model.latent_channels + model.condition_channels, *shape_dhw)
        if fused:
            x = x.contiguous(memory_format=torch.channels_last_3d)
        t = torch.zeros(batch)
        with (
            FlopCounterMode(display=False) as counter,
            saved_bytes(net) as kept,
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            net(x, t)
        largest = 0
        if model.activation_checkpointing:
            largest = _largest_stage(net, x, t, bf16)
    return parameters, float(counter.get_total_flops()), sum(kept.values()), largest


@contextmanager
def saved_bytes(module: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps inside the block, the parameters' own left out."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def _largest_stage(net: nn.Module, x: Tensor, t: Tensor, bf16: bool) -> int:
    """Bytes that the most demanding block keeps while it is recomputed."""
    sizes: list[int] = []
    net.eval()  # without recomputation, so that a block's own bytes are seen
    with saved_bytes(net) as kept:
        before: list[int] = []

        def enter(*_: Any) -> None:
            before.append(sum(kept.values()))

        def leave(*_: Any) -> None:
            sizes.append(sum(kept.values()) - before.pop())

        hooks = [
            h
            for m in net.modules()
            if isinstance(m, Stage)
            for h in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))
        ]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            net(x, t)
        for hook in hooks:
            hook.remove()
    return max(sizes)


def check_resources(need: StepEstimate, config: TrainConfig, device: torch.device, run_dir: Path) -> None:
    """Refuse to begin what cannot end: too little memory for a step, or no room for a checkpoint.

    Raises:
        InputError: Needed and present amounts, and what to change.
    """
    present = memory_present(device)
    if need.peak_bytes > present:
        raise InputError(
            f"a training step needs about {need.peak_bytes / 2**30:.1f} GiB ({need.state_bytes / 2**30:.1f} for "
            f"weights, gradients and optimiser, {need.activation_bytes / 2**30:.1f} for activations, "
            f"{need.image_bytes / 2**30:.1f} for the image losses, {need.exchange_bytes / 2**30:.1f} for the exchange "
            f"of gradients); "
            f"{present / 2**30:.1f} GiB are free on {device.type}{held_by_others(device)}",
            expected="a step that fits",
            remedy="; ".join(remedies(config)) + ".",
        )
    folder = run_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < need.checkpoint_bytes * 1.05:
        raise InputError(
            f"{free / 2**30:.1f} GiB free for the run directory",
            expected=f"{3 * need.checkpoint_bytes / 2**30:.1f} GiB: the last and best checkpoint, and one in writing",
            remedy="Free space or choose a run directory on another disk.",
        )


def remedies(config: TrainConfig) -> list[str]:
    """Return what would make a step smaller, the least costly first."""
    hints = []
    if config.data.batch_size > 1:
        hints.append(f"--set data.batch_size={config.data.batch_size // 2} (results do not change)")
    if not config.model.activation_checkpointing:
        hints.append("--set model.activation_checkpointing=true (a third slower)")
    if config.losses.ms_ssim_weight > 0 or config.losses.perceptual_weight > 0:
        smaller = f"losses.crop={(config.losses.crop or 64) // 2}"
        hints.append(f"--set {smaller} or --set losses.slab={max(1, config.losses.slab // 2)} for the image losses")
    if config.data.window is None:
        hints.append("--set data.window=32 (depth windows instead of whole volumes)")
    if config.model.latent_patch == 1:
        hints.append("--latent-patch 2")
    hints.append("several GPUs with --set parallel.strategy=fsdp, or a smaller preset")
    return hints


def memory_present(device: torch.device) -> int:
    """Bytes free on the device; for the CPU those of the control group, if it sets a limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_bytes()
