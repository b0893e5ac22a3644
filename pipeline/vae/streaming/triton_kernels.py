"""Triton kernels of the VAE's slabs; `vae_fused` decides where they run.

A slab is (n, H, W, C), channels last, with dense slices; slices may lie apart (the halves of a wider activation), and
the rows of a convolution's window may be longer than W. Voxels of a slice are counted row by row. Arithmetic is float32
between load and store.

Between two convolutions an activation is touched twice and no more: `finish_kernel` takes what the convolution library
wrote, adds bias and shortcut, writes it where it is kept and gathers its statistics; `normalise_kernel` reads it,
normalises, applies SiLU and writes it into the next convolution's window. Statistics are partial results of *chunks* of
voxels that never cross a slice, so that neither the slabs nor the order of programs shows in them.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

# Kernels are another language in Python's clothes: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from torch import Tensor

CHUNK = 2048
"""Voxels of one partial result."""
ROWS = 32
"""Voxels that one program holds at a time."""
CHANNELS = 64
"""Channels of one program: 128 bytes of bfloat16, a cache line of every voxel."""
_TAPS = 32
"""The 27 taps of a 3x3x3 convolution, filled up to what a matrix product takes."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The interpreter multiplies the bits of bfloat16 as if they were whole numbers; there products are taken in float32,
which holds them exactly."""


@triton.jit
def normalise_kernel(
    x_ptr, scale_ptr, shift_ptr, out_ptr, voxels, width, channels, x_slice, out_slice, out_row,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, AFFINE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """silu(x * scale + shift), written into a window whose rows are ``out_row`` values apart."""
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (voxel < voxels)[:, None] & real[None, :]
    x = tl.load(x_ptr + image * x_slice + voxel[:, None] * channels + channel[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if AFFINE:
        scale = tl.load(scale_ptr + channel, mask=real, other=0.0)
        shift = tl.load(shift_ptr + channel, mask=real, other=0.0)
        x = x * scale[None, :] + shift[None, :]
    if SILU:
        x = x * tl.sigmoid(x)
    at = (voxel // width) * out_row + (voxel % width) * channels
    tl.store(out_ptr + image * out_slice + at[:, None] + channel[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish_kernel(
    y_ptr, bias_ptr, shortcut_ptr, out_ptr, partial_ptr, voxels, width, channels, chunks,
    y_slice, shortcut_slice, out_slice, out_row,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SHORTCUT: tl.constexpr,
):  # fmt: skip
    """y + bias (+ shortcut), rounded and kept; and every channel's mean and sum of squared deviations in the chunk."""
    chunk = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    m2 = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, tl.minimum(CHUNK, voxels - chunk * CHUNK), ROWS):
        voxel = chunk * CHUNK + first + tl.arange(0, ROWS)
        inside = (voxel < voxels)[:, None] & real[None, :]
        at = voxel[:, None] * channels + channel[None, :]
        value = tl.load(y_ptr + image * y_slice + at, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
        if SHORTCUT:
            value += tl.load(shortcut_ptr + image * shortcut_slice + at, mask=inside, other=0.0).to(tl.float32)
        kept = value.to(out_ptr.dtype.element_ty)
        place = (voxel // width) * out_row + (voxel % width) * channels
        tl.store(out_ptr + image * out_slice + place[:, None] + channel[None, :], kept, mask=inside)
        before = tl.minimum(tl.maximum(voxels - chunk * CHUNK, 0), first).to(tl.float32)
        count = tl.minimum(tl.maximum(voxels - chunk * CHUNK - first, 0), ROWS).to(tl.float32)
        mean, m2 = _merge(tl.where(inside, kept.to(tl.float32), 0.0), inside, before, count, mean, m2)
    out = partial_ptr + (image * chunks + chunk) * 2 * channels + channel
    tl.store(out, mean, mask=real)
    tl.store(out + channels, m2, mask=real)


@triton.jit
def _merge(x, inside, before, count, mean, m2):
    """Add ``count`` rows to the moments of the ``before`` rows seen so far (Chan, Golub and LeVeque 1983)."""
    tile_mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    deviation = tl.where(inside, x - tile_mean[None, :], 0.0)
    share = count / tl.maximum(before + count, 1.0)
    delta = tile_mean - mean
    m2 += tl.sum(deviation * deviation, axis=0) + delta * delta * before * share
    return mean + delta * share, m2


@triton.jit
def first_convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, height, width, channels, chunks, out_slice, out_row,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TAPS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A 3x3x3 convolution of one channel, as a product of (voxels, taps) and (taps, channels).

    Output and statistics as in `finish_kernel`. The window has a slice more at either end; beyond its rows and columns
    are zeros.
    """
    chunk = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    voxels = height * width
    tap = tl.arange(0, TAPS)
    dz, dy, dx = tap // 9, (tap // 3) % 3 - 1, tap % 3 - 1
    of_tap = (tap < 27)[:, None] & real[None, :]
    weight = tl.load(weight_ptr + tap[:, None] * channels + channel[None, :], mask=of_tap, other=0.0)
    if WIDEN:
        weight = weight.to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    m2 = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, tl.minimum(CHUNK, voxels - chunk * CHUNK), ROWS):
        voxel = chunk * CHUNK + first + tl.arange(0, ROWS)
        y = (voxel // width)[:, None] + dy[None, :]
        x = (voxel % width)[:, None] + dx[None, :]
        seen = (voxel < voxels)[:, None] & (tap < 27)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        at = (image + dz[None, :]) * voxels + y * width + x
        taken = tl.load(x_ptr + at, mask=seen, other=0.0)
        if WIDEN:
            taken = taken.to(tl.float32)
        value = tl.dot(taken, weight, input_precision="ieee") + bias[None, :]
        kept = value.to(out_ptr.dtype.element_ty)
        inside = (voxel < voxels)[:, None] & real[None, :]
        place = (voxel // width) * out_row + (voxel % width) * channels
        tl.store(out_ptr + image * out_slice + place[:, None] + channel[None, :], kept, mask=inside)
        before = tl.minimum(tl.maximum(voxels - chunk * CHUNK, 0), first).to(tl.float32)
        count = tl.minimum(tl.maximum(voxels - chunk * CHUNK - first, 0), ROWS).to(tl.float32)
        mean, m2 = _merge(tl.where(inside, kept.to(tl.float32), 0.0), inside, before, count, mean, m2)
    out = partial_ptr + (image * chunks + chunk) * 2 * channels + channel
    tl.store(out, mean, mask=real)
    tl.store(out + channels, m2, mask=real)


@triton.jit
def last_convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, height, width, channels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A 3x3x3 convolution to one channel: a sum over 27 taps and all channels, in float32. Window as above."""
    image = tl.program_id(1).to(tl.int64)
    voxels = height * width
    voxel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tap in range(0, 27):
        y = voxel // width + (tap // 3) % 3 - 1
        x = voxel % width + tap % 3 - 1
        seen = (voxel < voxels) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        at = ((image + tap // 9) * voxels + y * width + x) * channels
        for block in range(0, channels, BLOCK):
            channel = block + tl.arange(0, BLOCK)
            real = channel < channels
            taken = tl.load(x_ptr + at[:, None] + channel[None, :], mask=seen[:, None] & real[None, :], other=0.0)
            weight = tl.load(weight_ptr + tap * channels + channel, mask=real, other=0.0)
            total += taken.to(tl.float32) * weight.to(tl.float32)[None, :]
    value = tl.sum(total, axis=1) + tl.load(bias_ptr).to(tl.float32)
    tl.store(out_ptr + image * voxels + voxel, value.to(out_ptr.dtype.element_ty), mask=voxel < voxels)


def chunks_of(slab_DHWC: Tensor) -> int:
    """Partial results of one slice."""
    return int(triton.cdiv(slab_DHWC.shape[1] * slab_DHWC.shape[2], CHUNK))


def normalise(
    x_DHWC: Tensor, out_DHWC: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *, silu: bool = False
) -> None:
    """Write ``silu(x * scale + shift)`` into ``out_DHWC``.

    That is a part of a window, of the same shape, whose slices and rows may be apart. Scale and shift are (C,) float32;
    without them the slab is copied.
    """
    n, height, width, channels = x_DHWC.shape
    grid = (triton.cdiv(height * width, ROWS), triton.cdiv(channels, CHANNELS), n)
    given = x_DHWC if scale is None else scale
    normalise_kernel[grid](
        x_DHWC, given, given if shift is None else shift, out_DHWC, height * width, width, channels,
        x_DHWC.stride(0), out_DHWC.stride(0), out_DHWC.stride(1),
        ROWS=ROWS, BLOCK=CHANNELS, AFFINE=scale is not None, SILU=silu,
    )  # fmt: skip


def finish(y_DHWC: Tensor, bias: Tensor, shortcut_DHWC: Tensor | None, out_DHWC: Tensor) -> Tensor:
    """``y + bias (+ shortcut)`` into ``out_DHWC``.

    That may be the shortcut's own memory, or a part of a window whose rows lie apart; the others have dense slices.

    Returns:
        (n * chunks, 2, C) float32: mean and sum of squared deviations of every chunk.
    """
    n, height, width, channels = y_DHWC.shape
    chunks = chunks_of(y_DHWC)
    partial = torch.empty((n * chunks, 2, channels), dtype=torch.float32, device=y_DHWC.device)
    beside = y_DHWC if shortcut_DHWC is None else shortcut_DHWC
    finish_kernel[(chunks, triton.cdiv(channels, CHANNELS), n)](
        y_DHWC, bias, beside, out_DHWC, partial, height * width, width, channels, chunks,
        y_DHWC.stride(0), beside.stride(0), out_DHWC.stride(0), out_DHWC.stride(1),
        CHUNK=CHUNK, ROWS=ROWS, BLOCK=CHANNELS, SHORTCUT=shortcut_DHWC is not None,
    )  # fmt: skip
    return partial


def first_convolution(window_DHW1: Tensor, weight_27C: Tensor, bias: Tensor, out_DHWC: Tensor) -> Tensor:
    """Convolve a dense window of n + 2 slices of one channel into n slices; returns moments as `finish` does."""
    n, height, width, channels = out_DHWC.shape
    chunks = chunks_of(out_DHWC)
    partial = torch.empty((n * chunks, 2, channels), dtype=torch.float32, device=out_DHWC.device)
    first_convolution_kernel[(chunks, triton.cdiv(channels, CHANNELS), n)](
        window_DHW1, weight_27C, bias, out_DHWC, partial, height, width, channels, chunks,
        out_DHWC.stride(0), out_DHWC.stride(1),
        CHUNK=CHUNK, ROWS=ROWS, BLOCK=CHANNELS, TAPS=_TAPS, WIDEN=INTERPRETED,
    )  # fmt: skip
    return partial


def last_convolution(window_DHWC: Tensor, weight_27C: Tensor, bias: Tensor, out_DHW1: Tensor) -> None:
    """Convolve a dense window of n + 2 slices into n dense slices of one channel."""
    n, height, width, _ = out_DHW1.shape
    channels = window_DHWC.shape[3]
    last_convolution_kernel[(triton.cdiv(height * width, ROWS), n)](
        window_DHWC, weight_27C, bias, out_DHW1, height, width, channels, ROWS=ROWS, BLOCK=CHANNELS
    )
