"""Runs an encoder or decoder as streams: decides what is stored, where, and in slabs of how many slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.vae import Blocks, Downsample, ResBlock, Upsample
from pipeline.vae.streaming.layers import Conv, Doubled, Down, Field, Normalised, Pointwise, Stored, Stream
from pipeline.vae.streaming.transfers import Lanes


@dataclass
class Pending:
    """An activation not computed yet.

    Its stream, memory of a spent activation that may hold it, and memory that is free once it has been computed.
    """

    stream: Stream
    home: Tensor | None = None
    spent: list[Tensor] = field(default_factory=list)


class SlabExecutor:
    """Streams slices through a chain of layers.

    Args:
        slab_bytes: Aim for one slab of one activation; a slab has at least one slice.
        offload: Keep whole activations in host memory (pinned, for a GPU) and only slabs on the device.
        dry_run: For `vae_plan`, on the meta device: stop every pass after two slabs, and take tensors
            that stand for host memory from this.
    """

    def __init__(
        self,
        slab_bytes: int,
        *,
        offload: bool = False,
        dry_run: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None,
    ) -> None:
        self.slab_bytes = slab_bytes
        self.offload = offload
        self.dry_run = dry_run
        self.free: list[Tensor] = []
        self.lanes: Lanes | None = None

    def run(self, layers: Blocks, source: Stream) -> Stream:
        """All layers on a source; the result is ready to be drained by `slabs`."""
        current: Pending | Field = Pending(source)
        for layer in layers.blocks:
            if isinstance(layer, ResBlock):
                current = self._res_block(self._stored(current), layer)
            elif isinstance(layer, Downsample):
                current = self._stored(Pending(Down(self._stream(current), layer)))
                self.free.clear()
            elif isinstance(layer, Upsample):
                if isinstance(current, Pending) and current.home is not None and not current.home.is_contiguous():
                    current.home = None  # half of a wider activation, which would stay alive whole
                current = self._stored(current)
                self.free.clear()  # nothing of the coarse grid but `current` is alive from here on
                current = self._stored(Pending(Conv(Doubled(Stored(current), layer.mode), layer)))
            elif isinstance(layer, nn.GroupNorm):
                current = Pending(Normalised(self._stored(current), layer, silu=False))
            elif isinstance(layer, nn.Conv3d):
                current = Pending(Conv(self._stream(current), layer))
            else:
                raise AssertionError(f"no streaming form of {type(layer).__name__}")
        return self._stream(current)

    def slabs(self, stream: Stream, stop: int | None = None) -> list[tuple[int, int]]:
        """Consecutive [start, stop) along a stream's depth, each of at most ``slab_bytes`` (one slice at least)."""
        depth = stream.depth if stop is None else stop
        step = max(1, self.slab_bytes // widest_slice_bytes(stream))
        slabs = [(start, min(start + step, depth)) for start in range(0, depth, step)]
        return slabs[:2] if self.dry_run is not None else slabs

    def _stream(self, current: Pending | Field) -> Stream:
        return Stored(current) if isinstance(current, Field) else current.stream

    def _stored(self, current: Pending | Field) -> Field:
        if isinstance(current, Field):
            return current
        stream = current.stream
        stored = self._field(current.home if current.home is not None else self._memory(stream), stream)
        for start, stop in self.slabs(stream):
            stored.write(start, stop, stream)
        self.free += current.spent
        return stored

    def _memory(self, stream: Stream) -> Tensor:
        for i, spent in enumerate(self.free):
            if spent.shape == stream.shape:
                return self.free.pop(i)
        if not self.offload:
            return allocate(stream.shape, stream.dtype, stream.device)
        if self.dry_run is not None:
            return self.dry_run(stream.shape, stream.dtype)
        pinned = stream.device.type == "cuda"
        return torch.empty(stream.shape, dtype=stream.dtype, device="cpu", pin_memory=pinned)

    def _field(self, values: Tensor, stream: Stream) -> Field:
        if self.offload and self.lanes is None:
            self.lanes = Lanes.of(stream.device)
        return Field(values, stream.device, self.lanes)

    def _res_block(self, x: Field, block: ResBlock) -> Pending:
        into_h = Conv(Normalised(x, block.norm1), block.conv1)
        if block.nin_shortcut is None:
            h = self._stored(Pending(into_h))
            out = Conv(Normalised(h, block.norm2), block.conv2, shortcut=Stored(x))
            return Pending(out, home=x.values, spent=[h.values])
        narrower = Pointwise(Stored(x), block.nin_shortcut)
        if block.conv1.in_channels >= 2 * block.conv1.out_channels and x.values.is_contiguous():
            h, shortcut = self._split(x, into_h, narrower)
            out = Conv(Normalised(h, block.norm2), block.conv2, shortcut=Stored(shortcut))
            return Pending(out, home=shortcut.values, spent=[h.values])
        h = self._stored(Pending(into_h))
        out = Conv(Normalised(h, block.norm2), block.conv2, shortcut=narrower)
        return Pending(out, home=h.values, spent=[x.values])

    def _split(self, x: Field, into_h: Conv, shortcut: Pointwise) -> tuple[Field, Field]:
        """Replace x, slice by slice, by the hidden layer and the shortcut, each at most half as wide.

        The widest activation of the decoder is then never joined by a second one.
        """
        depth, height, width, channels = into_h.shape
        half = height * width * channels
        flat = x.values.view(depth, -1)
        h = self._field(flat[:, :half].view(depth, height, width, channels), into_h)
        kept = self._field(flat[:, half : 2 * half].view(depth, height, width, channels), into_h)
        for start, stop in self.slabs(into_h):
            # The convolution has already taken the slices of x that h overwrites; the shortcut must do so first.
            narrow = shortcut.take(stop - start)
            h.write(start, stop, into_h)
            kept.keep(start, stop, narrow)
        return h, kept


def widest_slice_bytes(stream: Stream) -> int:
    """Bytes of what one output slice of a stream needs of the stream's or its source's slices, whichever is more."""
    _, height, width, channels = stream.shape
    values = height * width * channels
    window = getattr(stream, "window", None)
    if window is not None:
        _, h, w, c = window.source.shape
        per_slice = 2 if isinstance(stream, Down) else 1
        values = max(values, per_slice * h * w * c)
    return int(values * stream.dtype.itemsize)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a whole activation. On the CPU it comes from NumPy, which asks the kernel for huge pages."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.from_numpy(np.empty(count, dtype=np.uint8)).view(dtype).view(shape)
