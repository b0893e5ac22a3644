"""The processes that train together: who this one is, and the few things they agree on."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from diffusion.networks import contiguous_weights
from diffusion.runs import is_fsdp
from diffusion.training.regional import compile_blocks

COLLECTIVE_TIMEOUT = timedelta(hours=4)
"""Ranks wait this long for one that validates or saves."""


@dataclass(frozen=True)
class World:
    """This process among ``size``; every one has one device."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank; every rank must ask."""
        return here if self.size == 1 else bool(self.sum(torch.tensor(float(here), device=self.device)) > 0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def default_device(local_rank: int = 0) -> torch.device:
    """Return the local rank's GPU, or the CPU where there is none."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def join() -> World:
    """This process's place, from the variables that torchrun and Ray Train set; alone where there are none.

    Joins the process group (NCCL between GPUs, gloo between CPUs) unless a launcher already has.
    """
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World(device=default_device())
    device = default_device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
    return World(dist.get_rank(), dist.get_world_size(), device)


GLOO_SECONDS = 0.25
"""Time that a process waits for gloo's threads before it ends."""


def leave() -> None:
    """Leave the process group, if any.

    A thread of gloo's may still hold the last tensor of a finished exchange, and needs the interpreter to let go of it:
    were the interpreter already ending, the process would abort (exit code -6) after a training that succeeded.
    Sleeping hands the interpreter over.
    """
    if dist.is_available() and dist.is_initialized():
        gloo = dist.get_backend() == dist.Backend.GLOO
        dist.destroy_process_group()
        if gloo:
            time.sleep(GLOO_SECONDS)


def spread(module: nn.Module, world: World, strategy: Literal["ddp", "fsdp"], *, bf16: bool = False) -> nn.Module:
    """The module as all ranks train it: itself, a DDP wrapper around it, or itself sharded in place (see `shard`)."""
    if world.size == 1:
        return module
    if strategy == "fsdp":
        return shard(module, world, bf16=bf16)
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices)


def shard(module: nn.Module, world: World, *, bf16: bool = False) -> nn.Module:
    """Shard a module in place over all ranks (FSDP2): every large child and the root.

    So weights, gradients and the optimiser's moments are each kept once.

    FSDP2 refuses weights that are not contiguous: they become so, and the activations take their channels-last layout
    from the input instead.

    Args:
        bf16: The forward pass runs under bf16 autocast: weights are then gathered in bf16, half the traffic of float32,
            and gradients still summed in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    contiguous_weights(module)
    mesh = init_device_mesh(world.device.type, (world.size,))
    # Inputs keep their precision: times that are rounded to bf16 fall together.
    half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = half if bf16 else MixedPrecisionPolicy()
    for child in _large_children(module):
        fully_shard(child, mesh=mesh, mp_policy=policy)
    return cast(nn.Module, fully_shard(module, mesh=mesh, mp_policy=policy))


def compile_after_spreading(module: nn.Module, extent: Literal[True, "blocks", "whole"], backend: str) -> None:
    """Compile a module that `spread` has spread.

    Args:
        extent: ``blocks`` (or True): every kind of block of a U-Net once, seconds instead of minutes; a module that has
            none is compiled whole. ``whole``: in one graph, or, where it is sharded, one graph per sharded child. No
            graph holds a gather of weights in either case.
    """
    if extent != "whole" and compile_blocks(module, backend):
        return
    parts = _large_children(module) if is_fsdp(module) else [module]
    for part in parts:
        part.compile(backend=backend)


def reshard(module: nn.Module) -> None:
    """Free what FSDP2 has gathered, so that the next forward pass gathers the weights of then.

    A forward pass without gradients leaves the root gathered. Weights that are exchanged after it (the average for the
    live ones) would reach the root's shards only, and the next training step would compute with the old ones.
    """
    for part in module.modules():
        if is_fsdp(part):
            part.reshard()


def _large_children(module: nn.Module, at_least: int = 1_000_000) -> list[nn.Module]:
    """Direct children, lists opened, that hold enough parameters to be worth a collective of their own."""
    children: list[nn.Module] = []
    for child in module.children():
        children += list(child) if isinstance(child, nn.ModuleList) else [child]
    return [c for c in children if sum(p.numel() for p in c.parameters()) >= at_least]


def gradients_meet(model: nn.Module, meet: bool) -> AbstractContextManager[None]:
    """Whether this backward pass exchanges gradients between ranks: only the last of a step needs to."""
    if is_fsdp(model):
        model.set_requires_gradient_sync(meet)
    elif isinstance(model, DistributedDataParallel) and not meet:
        return cast(AbstractContextManager[None], model.no_sync())
    return nullcontext()
