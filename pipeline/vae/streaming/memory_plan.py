"""Memory that a run takes, known before it starts: the executor itself makes a dry run on shapes alone.

A dry run runs the same code on PyTorch's meta device, which computes nothing, and tracks every storage
that comes and goes. A pass repeats itself from its second slab on, so two slabs of each are enough.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentcache import InputError, free_host_bytes, held_by_others
from pipeline.vae import KlAutoencoder, VaeArchitecture
from pipeline.vae.streaming.executor import SlabExecutor
from pipeline.vae.streaming.layers import Stream

GIB = 2**30
_LIBRARY_BYTES = {"cpu": 8 << 20, "cuda": 768 << 20}
"""Bytes that convolution libraries keep beside our tensors: packed weights and workspaces. On a CPU measured (decision
0004); it counts only for volumes below about 100,000 voxels."""


@dataclass(frozen=True)
class Plan:
    """Plan of a volume's run.

    Attributes:
        slab_bytes: See `SlabExecutor`.
        offload: Whether whole activations live in pinned host memory.
        device_bytes: Predicted peak on the device, without the network's weights and the caller's own tensors.
        host_bytes: Predicted peak of pinned host memory.
    """

    slab_bytes: int
    offload: bool
    device_bytes: int
    host_bytes: int


class _AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Live bytes of the storages made on the meta device while it is active, and their peaks.

    Index 0 is the device, index 1 the host.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = [0, 0]
        self.peak = [0, 0]
        self.place = 0
        self.known: dict[int, Any] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import all of its compiler to keep it out of here: two seconds of each process's start."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = (kwargs or {}).get("out")
        if isinstance(out, Tensor) and out.is_meta:
            return out  # writes where memory is already; PyTorch's own answer, too, imports the compiler
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._enter(leaf.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.known:
            return

        def leave(_: Any) -> None:
            _, place = self.known.pop(key)
            self._count(place, -size)

        self.known[key] = (weakref.ref(storage, leave), self.place)
        self._count(self.place, size)

    def _count(self, place: int, size: int) -> None:
        self.live[place] += size
        self.peak[place] = max(self.peak[place], self.live[place])

    def on_host(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor in place of host memory."""
        self.place = 1
        try:
            return torch.empty(shape, dtype=dtype, device="meta")
        finally:
            self.place = 0


class _Blank(Stream):
    """An input of a given shape and no values."""

    def _produce(self, out_DHWC: Tensor) -> None:
        pass


@lru_cache(maxsize=64)
def rehearse(
    architecture: VaeArchitecture,
    part: str,
    shape_DHWC: tuple[int, int, int, int],
    dtype: torch.dtype,
    slab_bytes: int,
    offload: bool,
) -> tuple[int, int]:
    """Peak bytes on the device and in pinned host memory of the ``encoder`` or ``decoder`` on an input shape."""
    meta = torch.device("meta")
    with meta:
        layers = getattr(KlAutoencoder(architecture).to(dtype), part)
    with torch.inference_mode(), _AllocationTracker() as tracker:
        executor = SlabExecutor(slab_bytes, offload=offload, dry_run=tracker.on_host)
        stream = executor.run(layers, _Blank(shape_DHWC, dtype, meta))
        for start, stop in executor.slabs(stream):
            stream.take(stop - start)
    return tracker.peak[0], tracker.peak[1]


def make_plan(
    architecture: VaeArchitecture,
    part: str,
    shape_DHWC: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    slab_bytes: int,
    budget_bytes: int,
    host_budget_bytes: int | None = None,
) -> Plan:
    """The first plan that fits: the usual slabs, thinner slabs, then (on a GPU) activations in pinned host memory.

    Args:
        host_budget_bytes: What pinned host memory may take; None: any amount.

    Raises:
        InputError: None fits; names the bytes wanted and the bytes there are, on the device and in host memory.
    """
    slabs = dict.fromkeys((slab_bytes, max(1, slab_bytes // 4), 1))
    smallest, too_much_host = None, 0
    for offload, slab in product([False] if device.type == "cpu" else [False, True], slabs):
        on_device, on_host = rehearse(architecture, part, shape_DHWC, dtype, slab, offload)
        plan = Plan(slab, offload, on_device + _LIBRARY_BYTES.get(device.type, 0), on_host)
        if plan.device_bytes <= budget_bytes:
            if host_budget_bytes is None or plan.host_bytes <= host_budget_bytes:
                return plan
            too_much_host = plan.host_bytes
        if smallest is None or plan.device_bytes < smallest.device_bytes:
            smallest = plan
    assert smallest is not None
    size = "x".join(str(n) for n in shape_DHWC[:3])
    if too_much_host:
        raise InputError(
            f"the VAE's {part} needs {too_much_host / GIB:.2f} GiB of pinned host memory for {size}, with "
            f"{(host_budget_bytes or 0) / GIB:.2f} GiB free, because the device's {budget_bytes / GIB:.2f} GiB do not "
            "hold its activations",
            expected="host memory, within the container's limit, for what the device does not hold",
            remedy="Raise the container's memory limit, use a GPU with more memory, or crop the field of view.",
        )
    needed, free = smallest.device_bytes / GIB, budget_bytes / GIB
    raise InputError(
        f"the VAE's {part} needs {needed:.2f} GiB for {size}, with {free:.2f} GiB free{held_by_others(device)}",
        expected="a volume within the memory budget",
        remedy="Raise --memory-gib, free memory, use a machine with more, or crop the field of view.",
    )


def share_gib(device: torch.device, share: float) -> float | None:
    """GiB of a GPU for one of several workers on it, nine tenths of its share; None for a whole device.

    Of what is free the first worker would take all but a tenth, and the second would find no room.
    """
    if share >= 1 or device.type != "cuda":
        return None
    _, total = torch.cuda.mem_get_info(device)
    return 0.9 * share * total / GIB


def free_bytes(device: torch.device, memory_gib: float | None) -> int:
    """The budget: what the caller allows, else what is free now (nine tenths of it)."""
    if memory_gib is not None:
        return int(memory_gib * GIB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(0.9 * (free + cached))
    return int(0.9 * free_host_bytes())
