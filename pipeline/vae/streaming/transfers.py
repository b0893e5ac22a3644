"""Activations in host memory: slabs travel to and from the device while it computes.

Uploads run one slab ahead of their use and downloads one behind, each on a lane (a separate CUDA stream) and through
two staging slabs, so that both directions of the bus and the arithmetic overlap. What orders them is written here and
nowhere else:

- An upload into a staging slab waits for all that was computed so far, which includes whatever read that slab before,
  and for the last download into the memory that it reads.
- Whoever reads a staging slab waits for its upload.
- A download waits for all that was computed so far, so for what it carries, and for every upload of the slices that it
  overwrites: those were waited for before their successors were computed.
- A staging slab is written again once its download has ended.

Slices are copied one by one where they lie apart in memory: PyTorch would gather such a copy on the host first, at
once, without waiting for the download that fills what it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in a lane's work."""


class Lane(Protocol):
    """Copies in order, beside the arithmetic."""

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        """Copy once all that was computed so far is done and ``after`` is passed; returns the point behind it."""

    def wait(self, mark: Mark) -> None:
        """Let what is computed from here on wait for ``mark``."""

    def keep(self, staging: Tensor) -> None:
        """This lane touches ``staging``: its memory must not be used for something else before the lane is done."""


class AtOnce:
    """A device that is the host: a copy is done when it is asked for."""

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        copy_slices(target, source)
        return self

    def wait(self, mark: Mark) -> None:
        pass

    def keep(self, staging: Tensor) -> None:
        pass


class CudaLane:
    """A CUDA stream that copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        if after is not None:
            assert isinstance(after, torch.cuda.Event)
            self.stream.wait_event(after)
        with torch.cuda.stream(self.stream):
            copy_slices(target, source)
            mark: torch.cuda.Event = self.stream.record_event()
        return mark

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream(self.device).wait_event(mark)

    def keep(self, staging: Tensor) -> None:
        staging.record_stream(self.stream)


def copy_slices(target: Tensor, source: Tensor) -> None:
    """Copy without waiting, slice by slice where either has gaps between its slices."""
    if target.is_contiguous() and source.is_contiguous():
        target.copy_(source, non_blocking=True)
        return
    for own, other in zip(target, source, strict=True):
        own.copy_(other, non_blocking=True)


@dataclass
class Lanes:
    """One lane a direction, shared by all activations of an executor."""

    up: Lane
    down: Lane
    written: dict[int, Mark] = field(default_factory=dict)
    """By the address of host memory: the last download into it. Halves of one activation share theirs."""

    @classmethod
    def of(cls, device: torch.device) -> Lanes:
        if device.type == "cuda":
            return cls(CudaLane(device), CudaLane(device))
        return cls(AtOnce(), AtOnce())

    def last_download(self, values: Tensor) -> Mark | None:
        return self.written.get(values.untyped_storage()._cdata)


class Upload:
    """Reads an activation in host memory front to back."""

    def __init__(self, values_DHWC: Tensor, device: torch.device, lanes: Lanes) -> None:
        self.values = values_DHWC
        self.lanes = lanes
        self.staging = _Pair(values_DHWC, device, lanes.up)
        self.ahead: tuple[int, int, Tensor, Mark] | None = None

    def take(self, start: int, stop: int) -> Tensor:
        """Slices [start, stop) on the device, valid until the next call; the upload of as many more begins."""
        if self.ahead is None or self.ahead[0] != start or self.ahead[1] < stop:
            self.ahead = self._fetch(start, stop)
        _, _, slab, mark = self.ahead
        self.lanes.up.wait(mark)
        following = min(2 * stop - start, len(self.values))
        self.ahead = self._fetch(stop, following) if following > stop else None
        return slab[: stop - start]

    def _fetch(self, start: int, stop: int) -> tuple[int, int, Tensor, Mark]:
        slab, _ = self.staging.next(stop - start)
        mark = self.lanes.up.copy(slab, self.values[start:stop], self.lanes.last_download(self.values))
        return start, stop, slab, mark


class Download:
    """Writes an activation in host memory front to back."""

    def __init__(self, values_DHWC: Tensor, device: torch.device, lanes: Lanes) -> None:
        self.values = values_DHWC
        self.lanes = lanes
        self.staging = _Pair(values_DHWC, device, lanes.down)

    def put(self, start: int, stop: int, fill: Callable[[Tensor], object]) -> None:
        """``fill`` a slab on the device; it becomes slices [start, stop)."""
        slab, turn = self.staging.next(stop - start)
        if (before := self.staging.marks[turn]) is not None:
            self.lanes.down.wait(before)
        fill(slab)
        mark = self.lanes.down.copy(self.values[start:stop], slab, None)
        self.staging.marks[turn] = self.lanes.written[self.values.untyped_storage()._cdata] = mark


class _Pair:
    """Two staging slabs on the device, in turn."""

    def __init__(self, values_DHWC: Tensor, device: torch.device, lane: Lane) -> None:
        self.shape, self.dtype, self.device, self.lane = values_DHWC.shape[1:], values_DHWC.dtype, device, lane
        self.slabs: list[Tensor | None] = [None, None]
        self.marks: list[Mark | None] = [None, None]
        self.turn = 0

    def next(self, n: int) -> tuple[Tensor, int]:
        """Memory for n slices, and which of the two it is."""
        self.turn ^= 1
        slab = self.slabs[self.turn]
        if slab is None or len(slab) < n:
            slab = torch.empty((n, *self.shape), dtype=self.dtype, device=self.device)
            self.lane.keep(slab)
            self.slabs[self.turn] = slab
        return slab[:n], self.turn
