"""Exact execution of the autoencoder in depth slabs.

Every layer but GroupNorm looks at a slice above and a slice below, so the network runs as a chain of streams: each
yields its output slices in order and pulls from its source what it needs, keeping the one or two slices of overlap that
the next slab shares. GroupNorm needs the statistics of its whole input first: in front of each one, and only there, an
activation is stored whole (`Field`), its statistics gathered as it is written and applied, with SiLU, as it is read.
Two activations at the finest grid are the floor: a residual block's input and its hidden layer. The block's output
overwrites its input slab by slab.

Slabs are (n, H, W, C), channels last: DHWC. No slice is computed twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.vae.streaming.fused import DeviceMoments, FusedAffine, FusedConvolution, is_fused
from pipeline.vae.streaming.group_norm import Affine, ChannelMoments
from pipeline.vae.streaming.transfers import Download, Lanes, Upload


def conv3d(x_DHWC: Tensor, layer: nn.Conv3d, padding: tuple[int, int, int], *, bias: bool = True) -> Tensor:
    """Convolve a slab; returns (n, H, W, C) dense. ``layer.weight`` is kept in channels-last order."""
    if x_DHWC.is_meta:  # a dry run: there conv3d answers in another layout, and a copy that no device makes would count
        sizes = zip(x_DHWC.shape[:3], padding, layer.kernel_size, layer.stride, strict=True)
        return x_DHWC.new_empty([*((n + 2 * p - k) // s + 1 for n, p, k, s in sizes), layer.out_channels])
    x = as_image(x_DHWC)
    if x.device.type == "cpu" and mkldnn_convolves(x.dtype):
        # What conv3d calls for large inputs; for small ones (one channel, a thin slab) it would choose a path that is
        # many times slower.
        y = torch.mkldnn_convolution(x, layer.weight, layer.bias if bias else None, padding, layer.stride, (1, 1, 1), 1)
    else:
        y = F.conv3d(x, layer.weight, layer.bias if bias else None, layer.stride, padding)
    return as_slab(y).contiguous()


@lru_cache
def mkldnn_convolves(dtype: torch.dtype) -> bool:
    """Whether this CPU's convolution library takes a dtype.

    bfloat16 needs AVX-512, without which PyTorch's own convolution is slow but right.
    """
    if not torch._C._has_mkldnn:
        return False
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def as_image(x_DHWC: Tensor) -> Tensor:
    """A slab as (1, C, n, H, W) in channels-last layout, without a copy.

    The batch axis is put first before the axes move, or its stride would not say channels-last and PyTorch would answer
    in another layout.
    """
    return x_DHWC.unsqueeze(0).permute(0, 4, 1, 2, 3)


def as_slab(y: Tensor) -> Tensor:
    """The inverse of `as_image`."""
    return y[0].permute(1, 2, 3, 0)


class Stream(ABC):
    """Slices of an activation, in order, once. Subclasses write the next slices into memory that the caller owns."""

    def __init__(self, shape_DHWC: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape_DHWC
        self.dtype = dtype
        self.device = device
        self.position = 0

    @property
    def depth(self) -> int:
        return self.shape[0]

    def read(self, out_DHWC: Tensor, moments: ChannelMoments | DeviceMoments | None = None) -> None:
        """Write the next ``len(out_DHWC)`` slices and count them in ``moments``."""
        if moments is None:
            self._produce(out_DHWC)
        else:
            self._produce_counted(out_DHWC, moments)
        self.position += len(out_DHWC)
        assert self.position <= self.depth, "read past the end of a stream"

    def take(self, n: int) -> Tensor:
        """The next n slices, valid until the next call."""
        out = self.empty(n)
        self.read(out)
        return out

    def empty(self, n: int, extra: int = 0) -> Tensor:
        """Uninitialised memory for n slices, in-plane enlarged by ``extra``."""
        _, height, width, channels = self.shape
        return torch.empty((n, height + extra, width + extra, channels), dtype=self.dtype, device=self.device)

    @abstractmethod
    def _produce(self, out_DHWC: Tensor) -> None: ...

    def _produce_counted(self, out_DHWC: Tensor, moments: ChannelMoments | DeviceMoments) -> None:
        self._produce(out_DHWC)
        moments.add(out_DHWC)


class Field:
    """A whole activation in memory, (D, H, W, C) with dense slices, and the moments of its channels.

    Its memory may be the host's while the streams compute on ``device``.
    """

    def __init__(self, values_DHWC: Tensor, device: torch.device, lanes: Lanes | None = None) -> None:
        """``lanes`` carry the slabs of an activation that is in host memory."""
        self.values = values_DHWC
        self.device = device
        self.lanes = lanes
        self.download = None if lanes is None else Download(values_DHWC, device, lanes)
        on_device = device.type == "cuda" or is_fused(device)
        self.moments = (DeviceMoments if on_device else ChannelMoments)(values_DHWC.shape[-1])

    def write(self, start: int, stop: int, source: Stream) -> None:
        """Fill slices from a stream and count them in the statistics."""
        self._fill(start, stop, lambda slab: source.read(slab, self.moments))

    def keep(self, start: int, stop: int, slab_DHWC: Tensor) -> None:
        """Fill slices from a slab on the device; the statistics do not count them."""
        self._fill(start, stop, lambda slab: slab.copy_(slab_DHWC))

    def _fill(self, start: int, stop: int, fill: Callable[[Tensor], object]) -> None:
        if self.download is None:
            fill(self.values[start:stop])
        else:
            self.download.put(start, stop, fill)


class Stored(Stream):
    """Reads a field as it is."""

    def __init__(self, field: Field) -> None:
        d, h, w, c = field.values.shape
        super().__init__((d, h, w, c), field.values.dtype, field.device)
        self.field = field
        self.upload = None if field.lanes is None else Upload(field.values, field.device, field.lanes)

    def take(self, n: int) -> Tensor:
        """A view where the values are on the device already."""
        found = self._slices(n)
        self.position += n
        return found

    def _slices(self, n: int) -> Tensor:
        start, stop = self.position, self.position + n
        return self.field.values[start:stop] if self.upload is None else self.upload.take(start, stop)

    def _produce(self, out_DHWC: Tensor) -> None:
        out_DHWC.copy_(self._slices(len(out_DHWC)))


class Normalised(Stored):
    """A field read through GroupNorm with the field's own statistics, and SiLU.

    MAISI has no SiLU behind the last norm of encoder and decoder.
    """

    def __init__(self, field: Field, norm: nn.GroupNorm, *, silu: bool = True) -> None:
        super().__init__(field)
        scale, shift = field.moments.affine(norm)
        self.kernel = (
            FusedAffine(scale, shift, silu=silu)
            if is_fused(self.device)
            else Affine(scale, shift, self.shape[2], silu=silu)
        )

    def take(self, n: int) -> Tensor:
        return Stream.take(self, n)

    def _produce(self, out_DHWC: Tensor) -> None:
        self.kernel.apply(self._slices(len(out_DHWC)), out_DHWC)


class Window:
    """The slices of a source that one convolution sees.

    Consecutive windows share ``overlap`` slices, which move to the front instead of being computed again. Beyond both
    ends are zeros, the convolution's padding.
    """

    def __init__(self, source: Stream, overlap: int, margin: int) -> None:
        self.source = source
        self.overlap = overlap
        self.margin = margin
        self.buffer = source.empty(0)
        self.filled = 0

    def advance(self, n: int, lead: int) -> Tensor:
        """The window of n slices; the first one begins with ``lead`` zero slices."""
        _, h, w, _ = self.source.shape
        if len(self.buffer) < n:
            grown = self.source.empty(n, self.margin)
            if self.margin:
                grown[:, h:].zero_()
                grown[:, :, w:].zero_()
            if self.filled:
                grown[: self.overlap].copy_(self.buffer[self.filled - self.overlap : self.filled])
            else:
                grown[:lead, :h, :w].zero_()
            self.buffer = grown
            start = self.overlap if self.filled else lead
        else:
            # One by one where both ends may meet, front to back.
            step = self.overlap if self.filled >= 2 * self.overlap else 1
            for i in range(0, self.overlap, step):
                behind = self.filled - self.overlap + i
                self.buffer[i : i + step].copy_(self.buffer[behind : behind + step])
            start = self.overlap
        stop = start + min(n - start, self.source.depth - self.source.position)
        if stop > start:
            self.source.read(self.buffer[start:stop, :h, :w])
        self.buffer[stop:n].zero_()
        self.filled = n
        return self.buffer[:n]


class Conv(Stream):
    """A 3x3x3 convolution of stride 1, zero-padded at the volume's borders, plus an optional shortcut."""

    def __init__(self, source: Stream, layer: nn.Conv3d, shortcut: Stream | None = None) -> None:
        d, h, w, _ = source.shape
        super().__init__((d, h, w, layer.out_channels), source.dtype, source.device)
        self.window = Window(source, overlap=2, margin=0)
        self.layer = layer
        self.shortcut = shortcut
        self.fused = FusedConvolution(layer, self._plain) if is_fused(self.device) else None

    def _plain(self, window_DHWC: Tensor) -> Tensor:
        return conv3d(window_DHWC, self.layer, (0, 1, 1), bias=False)

    def _produce(self, out_DHWC: Tensor) -> None:
        if self.fused is not None:
            self._write_fused(self.fused, out_DHWC, None)
            return
        n = len(out_DHWC)
        y = conv3d(self.window.advance(n + 2, lead=1), self.layer, (0, 1, 1))
        if self.shortcut is None:
            out_DHWC.copy_(y)
        else:
            torch.add(y, self.shortcut.take(n), out=out_DHWC)

    def _produce_counted(self, out_DHWC: Tensor, moments: ChannelMoments | DeviceMoments) -> None:
        if self.fused is None or not isinstance(moments, DeviceMoments):
            super()._produce_counted(out_DHWC, moments)
            return
        self._write_fused(self.fused, out_DHWC, moments)

    def _write_fused(self, fused: FusedConvolution, out_DHWC: Tensor, moments: DeviceMoments | None) -> None:
        n = len(out_DHWC)
        window = self.window.advance(n + 2, lead=1)
        fused.write(window, None if self.shortcut is None else self.shortcut.take(n), out_DHWC, moments)


class Pointwise(Stream):
    """A 1x1x1 convolution."""

    def __init__(self, source: Stream, layer: nn.Conv3d) -> None:
        d, h, w, _ = source.shape
        super().__init__((d, h, w, layer.out_channels), source.dtype, source.device)
        self.source = source
        self.layer = layer

    def take(self, n: int) -> Tensor:
        self.position += n
        return conv3d(self.source.take(n), self.layer, (0, 0, 0))

    def _produce(self, out_DHWC: Tensor) -> None:
        out_DHWC.copy_(conv3d(self.source.take(len(out_DHWC)), self.layer, (0, 0, 0)))


class Down(Stream):
    """MAISI's downsampling: stride 2, one zero voxel appended to every axis."""

    def __init__(self, source: Stream, layer: nn.Conv3d) -> None:
        d, h, w, _ = source.shape
        super().__init__((d // 2, h // 2, w // 2, layer.out_channels), source.dtype, source.device)
        self.window = Window(source, overlap=1, margin=1)
        self.layer = layer
        self.fused = FusedConvolution(layer, self._plain) if is_fused(self.device) else None

    def _plain(self, window_DHWC: Tensor) -> Tensor:
        return conv3d(window_DHWC, self.layer, (0, 0, 0), bias=False)

    def _produce(self, out_DHWC: Tensor) -> None:
        out_DHWC.copy_(conv3d(self.window.advance(2 * len(out_DHWC) + 1, lead=0), self.layer, (0, 0, 0)))

    def _produce_counted(self, out_DHWC: Tensor, moments: ChannelMoments | DeviceMoments) -> None:
        if self.fused is None or not isinstance(moments, DeviceMoments):
            super()._produce_counted(out_DHWC, moments)
            return
        self.fused.write(self.window.advance(2 * len(out_DHWC) + 1, lead=0), None, out_DHWC, moments)


class Doubled(Stream):
    """Every axis doubled by interpolation.

    Coarse slices in plane, one at a time, then along depth, where a fine slice is three quarters the coarse slice
    around it and one quarter the neighbour on its side (trilinear, half-pixel centres).
    """

    def __init__(self, source: Stream, mode: str) -> None:
        d, h, w, c = source.shape
        super().__init__((2 * d, 2 * h, 2 * w, c), source.dtype, source.device)
        self.source = source
        self.mode = mode
        self.planes: dict[int, Tensor] = {}

    def _produce(self, out_DHWC: Tensor) -> None:
        for fine, out_HWC in enumerate(out_DHWC, start=self.position):
            own = fine // 2
            if self.mode == "nearest":
                out_HWC.copy_(self._plane(own))
                continue
            side = min(max(own + (1 if fine % 2 else -1), 0), self.source.depth - 1)
            torch.lerp(self._plane(own), self._plane(side), 0.25, out=out_HWC)

    def _plane(self, coarse: int) -> Tensor:
        """A coarse slice, doubled in plane: the last one taken, the one before it, or the next."""
        if coarse not in self.planes:
            self.planes = {i: plane for i, plane in self.planes.items() if i == coarse - 1}
            image = self.source.take(1).permute(0, 3, 1, 2)
            mode = "nearest" if self.mode == "nearest" else "bilinear"
            if image.is_meta:  # a dry run: only its size counts, and PyTorch would import its compiler for it
                _, channels, height, width = image.shape
                doubled = image.new_empty(1, channels, 2 * height, 2 * width)
            else:
                doubled = F.interpolate(image, scale_factor=2.0, mode=mode)
            self.planes[coarse] = doubled[0].permute(1, 2, 0)
        return self.planes[coarse]
