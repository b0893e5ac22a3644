"""Activation checkpointing `auto`: recompute only the blocks that must be, chosen before the first step.

A block that is kept costs the bytes that its backward pass needs; one that is recomputed costs its input, its forward
arithmetic once more, and during that block's backward pass the bytes of keeping it. All three are counted on shapes
alone. Of the sets that fit, the one with the least arithmetic is wanted: a knapsack of some twenty blocks, filled in
order of bytes saved per operation and then thinned out, the most expensive first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion.networks import UNet, UNetConfig, assume_fused, build_unet
from diffusion.training.resources import WORKSPACE, StepEstimate, memory_present, saved_bytes

log = logging.getLogger("ctpipe.train")


@dataclass(frozen=True)
class BlockCost:
    """Of one block of the U-Net, for a micro-batch.

    Attributes:
        kept_bytes: What its backward pass needs, where it is kept.
        input_bytes: What recomputing it needs in between.
        flops: Its forward pass.
    """

    kept_bytes: int
    input_bytes: int
    flops: float


def block_costs(
    config: UNetConfig, batch: int, shape_dhw: tuple[int, int, int], *, bf16: bool, fused: bool
) -> list[BlockCost]:
    """The costs of `UNet.blocks`, in their order. ``fused``: as where the Triton kernels run."""
    with warnings.catch_warnings(), FakeTensorMode(), assume_fused(fused):
        warnings.simplefilter("ignore")
        net = build_unet(config).eval()  # in evaluation mode nothing is recomputed, so that a block's own bytes show
        found: list[BlockCost] = []
        with saved_bytes(net) as kept, FlopCounterMode(display=False) as counter:
            before: list[tuple[int, float]] = []

            def enter(*_: Any) -> None:
                before.append((sum(kept.values()), float(counter.get_total_flops())))

            def leave(block: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                bytes_before, flops_before = before.pop()
                found.append(
                    BlockCost(
                        sum(kept.values()) - bytes_before,
                        inputs[0].untyped_storage().nbytes(),
                        float(counter.get_total_flops()) - flops_before,
                    )
                )

            for block in net.blocks():
                block.register_forward_pre_hook(enter)
                block.register_forward_hook(leave)
            x = torch.zeros(batch, config.latent_channels + config.condition_channels, *shape_dhw)
            if fused:
                x = x.contiguous(memory_format=torch.channels_last_3d)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                net(x, torch.zeros(batch))
    return found


def cheapest(costs: Sequence[BlockCost], room_bytes: float) -> frozenset[int]:
    """Indices of the blocks to recompute so that all blocks fit into ``room_bytes``; all of them if nothing does."""
    chosen: set[int] = set()
    order = sorted(
        range(len(costs)), key=lambda i: (costs[i].kept_bytes - costs[i].input_bytes) / max(1.0, costs[i].flops)
    )
    while bytes_of(costs, chosen) > room_bytes and order:
        chosen.add(order.pop())
    for index in sorted(chosen, key=lambda i: -costs[i].flops):
        if bytes_of(costs, chosen - {index}) <= room_bytes:
            chosen.discard(index)
    return frozenset(chosen)


def bytes_of(costs: Sequence[BlockCost], recomputed: set[int] | frozenset[int]) -> int:
    """Return the bytes that the blocks hold at most: all that is kept, and the largest recomputed block at work."""
    held = sum(c.input_bytes if i in recomputed else c.kept_bytes for i, c in enumerate(costs))
    return held + max((costs[i].kept_bytes for i in recomputed), default=0)


def fit_recomputation(
    unet: UNet, batch: int, shape_dhw: tuple[int, int, int], need: StepEstimate, device: torch.device, *, bf16: bool
) -> frozenset[int]:
    """Choose for this network and device, and set it; call it with the network on the device and before the optimiser.

    Args:
        need: The estimate of the step with every block recomputed, of which all but the activations is put by.
    """
    costs = block_costs(unet.config, batch, shape_dhw, bf16=bf16, fused=device.type == "cuda")
    placed = sum(p.numel() * p.element_size() for p in unet.parameters())
    others = need.peak_bytes / WORKSPACE - need.activation_bytes
    room = (memory_present(device) + placed) / WORKSPACE - others
    chosen = cheapest(costs, room)
    unet.recompute(chosen)
    again = sum(costs[i].flops for i in chosen) / max(1.0, sum(c.flops for c in costs))
    log.info(
        "%d of %d blocks are recomputed (%.0f%% of the forward pass again): %.1f GiB for activations, %.1f GiB of room",
        len(chosen), len(costs), 100 * again, bytes_of(costs, chosen) / 2**30, room / 2**30,
    )  # fmt: skip
    return chosen
