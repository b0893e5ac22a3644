"""Triton kernels of GroupNorm, modulation and SiLU on channels-last activations; `fused_norm` calls them.

An activation (B, C, D, H, W) in channels-last order is B samples of S = D*H*W rows of C values. Sums run over *chunks*
of rows that lie in one sample; each chunk leaves its partial result, and one small kernel adds these up in float64, in
the same order every time: no atomic additions, so the same input gives the same bytes. Arithmetic is float32 between
load and store, whatever the activation's dtype.

With xhat = (x - mean) * rstd of the group (Wu and He 2018, equation 1), scale s and shift t of the time embedding:

    u = (xhat * weight + bias) * (1 + s) + t,     y = u * sigmoid(u)

``coefficients`` hold, of every sample and channel, the mean of its group, k = rstd * weight * (1 + s) and
o = bias * (1 + s) + t, so that u = (x - mean) * k + o.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Kernels are another language in Python's clothes: their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from torch import Tensor

CHANNELS = 64
"""Channels of one program: 128 bytes of bfloat16, a whole cache line of every row."""
ROWS = 32
"""Rows that one program holds at a time."""


def chunk_rows(rows: int) -> int:
    """Rows of one partial sum: enough programs to fill a GPU at the coarse grids, few partial sums at the fine ones."""
    return 1024 if rows > 1 << 17 else 256 if rows > 1 << 13 else 64


@triton.jit
def moments_kernel(
    x_ptr, partial_ptr, rows, channels, chunks,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of every channel over one chunk of rows (Chan, Golub and LeVeque 1983)."""
    chunk = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    base = x_ptr + sample * rows * channels
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    m2 = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, tl.minimum(CHUNK, rows - chunk * CHUNK), ROWS):
        row = chunk * CHUNK + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & real[None, :]
        x = tl.load(base + row.to(tl.int64)[:, None] * channels + channel[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        before = tl.minimum(tl.maximum(rows - chunk * CHUNK, 0), first).to(tl.float32)
        count = tl.minimum(tl.maximum(rows - chunk * CHUNK - first, 0), ROWS).to(tl.float32)
        tile_mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
        deviation = tl.where(inside, x - tile_mean[None, :], 0.0)
        share = count / tl.maximum(before + count, 1.0)
        delta = tile_mean - mean
        mean += delta * share
        m2 += tl.sum(deviation * deviation, axis=0) + delta * delta * before * share
    out = partial_ptr + (sample * chunks + chunk) * 2 * channels + channel
    tl.store(out, mean, mask=real)
    tl.store(out + channels, m2, mask=real)


@triton.jit
def coefficients_kernel(
    partial_ptr, weight_ptr, bias_ptr, modulation_ptr, coefficients_ptr, rstd_ptr,
    rows, channels, groups, chunks, eps,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    """Join the partial moments of one group of one sample, and write what `apply_kernel` multiplies and adds."""
    group = tl.program_id(0)
    sample = tl.program_id(1)
    width = channels // groups
    offset = tl.arange(0, WIDTH)
    real = offset < width
    channel = group * width + offset
    base = partial_ptr + sample.to(tl.int64) * chunks * 2 * channels
    count = (rows * width).to(tl.float64)
    total = tl.zeros([WIDTH], dtype=tl.float64)
    for first in range(0, chunks, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < chunks)[:, None] & real[None, :]
        at = base + part.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        size = tl.minimum(tl.maximum(rows - part * CHUNK, 0), CHUNK).to(tl.float64)
        total += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float64) * size[:, None], axis=0)
    mean = tl.sum(total, axis=0) / count
    total = tl.zeros([WIDTH], dtype=tl.float64)
    for first in range(0, chunks, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < chunks)[:, None] & real[None, :]
        at = base + part.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        size = tl.minimum(tl.maximum(rows - part * CHUNK, 0), CHUNK).to(tl.float64)
        own = tl.load(at, mask=inside, other=0.0).to(tl.float64) - mean
        m2 = tl.load(at + channels, mask=inside, other=0.0).to(tl.float64)
        total += tl.sum(tl.where(inside, m2 + own * own * size[:, None], 0.0), axis=0)
    variance = tl.sum(total, axis=0) / count
    rstd = 1.0 / tl.sqrt((variance + eps).to(tl.float32))
    k = rstd * tl.load(weight_ptr + channel, mask=real, other=0.0).to(tl.float32)
    o = tl.load(bias_ptr + channel, mask=real, other=0.0).to(tl.float32)
    if MODULATED:
        at_scale = modulation_ptr + sample * 2 * channels + channel
        scale = 1.0 + tl.load(at_scale, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(at_scale + channels, mask=real, other=0.0).to(tl.float32)
        k *= scale
        o = o * scale + shift
    out = coefficients_ptr + sample * 3 * channels + channel
    tl.store(out, tl.zeros([WIDTH], dtype=tl.float32) + mean.to(tl.float32), mask=real)
    tl.store(out + channels, k, mask=real)
    tl.store(out + 2 * channels, o, mask=real)
    tl.store(rstd_ptr + sample * groups + group, rstd)


@triton.jit
def apply_kernel(
    x_ptr, coefficients_ptr, y_ptr, rows, channels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y = silu((x - mean) * k + o) of a tile of rows and channels."""
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & real[None, :]
    at = sample * rows * channels + row.to(tl.int64)[:, None] * channels + channel[None, :]
    from_ptr = coefficients_ptr + sample * 3 * channels + channel
    mean = tl.load(from_ptr, mask=real, other=0.0)
    k = tl.load(from_ptr + channels, mask=real, other=0.0)
    o = tl.load(from_ptr + 2 * channels, mask=real, other=0.0)
    u = (tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]) * k[None, :] + o[None, :]
    if SILU:
        u = u * tl.sigmoid(u)
    tl.store(y_ptr + at, u.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gradient_sums_kernel(
    x_ptr, gradient_ptr, coefficients_ptr, partial_ptr, rows, channels, chunks,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Over one chunk of rows and for every channel: the sum of dL/du, and of dL/du * (x - mean)."""
    chunk = tl.program_id(0)
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    from_ptr = coefficients_ptr + sample * 3 * channels + channel
    mean = tl.load(from_ptr, mask=real, other=0.0)
    k = tl.load(from_ptr + channels, mask=real, other=0.0)
    o = tl.load(from_ptr + 2 * channels, mask=real, other=0.0)
    plain = tl.zeros([BLOCK], dtype=tl.float32)
    weighted = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, tl.minimum(CHUNK, rows - chunk * CHUNK), ROWS):
        row = chunk * CHUNK + first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & real[None, :]
        at = sample * rows * channels + row.to(tl.int64)[:, None] * channels + channel[None, :]
        centred = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        du = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            u = centred * k[None, :] + o[None, :]
            gate = tl.sigmoid(u)
            du = du * gate * (1.0 + u * (1.0 - gate))
        plain += tl.sum(du, axis=0)
        weighted += tl.sum(du * centred, axis=0)
    out = partial_ptr + (sample * chunks + chunk) * 2 * channels + channel
    tl.store(out, plain, mask=real)
    tl.store(out + channels, weighted, mask=real)


@triton.jit
def gradient_coefficients_kernel(
    partial_ptr, coefficients_ptr, rstd_ptr, sums_ptr, back_ptr, rows, channels, groups, chunks,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Join the partial sums of one group of one sample.

    ``sums`` gets, per channel, the sum of dL/du and of dL/du * xhat; ``back``, per channel, the two numbers of its
    group that `input_gradient_kernel` subtracts.
    """
    group = tl.program_id(0)
    sample = tl.program_id(1)
    width = channels // groups
    offset = tl.arange(0, WIDTH)
    real = offset < width
    channel = group * width + offset
    base = partial_ptr + sample.to(tl.int64) * chunks * 2 * channels
    plain = tl.zeros([WIDTH], dtype=tl.float64)
    weighted = tl.zeros([WIDTH], dtype=tl.float64)
    for first in range(0, chunks, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < chunks)[:, None] & real[None, :]
        at = base + part.to(tl.int64)[:, None] * 2 * channels + channel[None, :]
        plain += tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float64), axis=0)
        weighted += tl.sum(tl.load(at + channels, mask=inside, other=0.0).to(tl.float64), axis=0)
    rstd = tl.load(rstd_ptr + sample * groups + group)
    k = tl.load(coefficients_ptr + sample * 3 * channels + channels + channel, mask=real, other=0.0)
    out = sums_ptr + sample * 2 * channels + channel
    tl.store(out, plain.to(tl.float32), mask=real)
    tl.store(out + channels, weighted.to(tl.float32) * rstd, mask=real)
    count = (rows * width).to(tl.float32)
    mean_plain = tl.sum(plain.to(tl.float32) * k, axis=0) / count
    mean_weighted = tl.sum(weighted.to(tl.float32) * k, axis=0) * rstd * rstd / count
    back = back_ptr + sample * 2 * channels + channel
    tl.store(back, tl.zeros([WIDTH], dtype=tl.float32) + mean_plain, mask=real)
    tl.store(back + channels, tl.zeros([WIDTH], dtype=tl.float32) + mean_weighted, mask=real)


@triton.jit
def input_gradient_kernel(
    x_ptr, gradient_ptr, coefficients_ptr, back_ptr, out_ptr, rows, channels,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dL/dx = k dL/du - (what moves the group's mean) - (x - mean) * (what moves its variance)."""
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & real[None, :]
    at = sample * rows * channels + row.to(tl.int64)[:, None] * channels + channel[None, :]
    from_ptr = coefficients_ptr + sample * 3 * channels + channel
    mean = tl.load(from_ptr, mask=real, other=0.0)
    k = tl.load(from_ptr + channels, mask=real, other=0.0)
    o = tl.load(from_ptr + 2 * channels, mask=real, other=0.0)
    back = back_ptr + sample * 2 * channels + channel
    mean_plain = tl.load(back, mask=real, other=0.0)
    mean_weighted = tl.load(back + channels, mask=real, other=0.0)
    centred = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
    du = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        u = centred * k[None, :] + o[None, :]
        gate = tl.sigmoid(u)
        du = du * gate * (1.0 + u * (1.0 - gate))
    dx = du * k[None, :] - mean_plain[None, :] - centred * mean_weighted[None, :]
    tl.store(out_ptr + at, dx.to(out_ptr.dtype.element_ty), mask=inside)


def forward(
    x_BCDHW: Tensor, weight: Tensor, bias: Tensor, modulation: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, in the input's dtype and layout, the coefficients (B, 3, C) and rstd (B, groups), both float32.

    Args:
        x_BCDHW: Dense in channels-last order.
        modulation: (B, 2 C): scale, then shift; dense. None: neither.
    """
    batch, channels = x_BCDHW.shape[:2]
    rows = x_BCDHW[0, 0].numel()
    chunk, blocks = chunk_rows(rows), triton.cdiv(channels, CHANNELS)
    chunks = triton.cdiv(rows, chunk)
    device = x_BCDHW.device
    partial = torch.empty((batch, chunks, 2, channels), device=device)
    coefficients = torch.empty((batch, 3, channels), device=device)
    rstd = torch.empty((batch, groups), device=device)
    y = torch.empty_like(x_BCDHW)
    moments_kernel[(chunks, blocks, batch)](
        x_BCDHW, partial, rows, channels, chunks, CHUNK=chunk, ROWS=ROWS, BLOCK=CHANNELS
    )
    coefficients_kernel[(groups, batch)](
        partial, weight, bias, weight if modulation is None else modulation, coefficients, rstd,
        rows, channels, groups, chunks, eps,
        CHUNK=chunk, PARTS=32, WIDTH=triton.next_power_of_2(channels // groups), MODULATED=modulation is not None,
    )  # fmt: skip
    apply_kernel[(triton.cdiv(rows, ROWS), blocks, batch)](
        x_BCDHW, coefficients, y, rows, channels, ROWS=ROWS, BLOCK=CHANNELS, SILU=silu
    )
    return y, coefficients, rstd


def backward(
    x_BCDHW: Tensor, gradient_BCDHW: Tensor, coefficients: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor]:
    """dL/dx, and per sample and channel the sums of dL/du and of dL/du * xhat: (B, 2, C) float32.

    Args:
        gradient_BCDHW: dL/dy, dense in channels-last order as ``x_BCDHW`` is.
    """
    batch, channels = x_BCDHW.shape[:2]
    groups = rstd.shape[1]
    rows = x_BCDHW[0, 0].numel()
    chunk, blocks = chunk_rows(rows), triton.cdiv(channels, CHANNELS)
    chunks = triton.cdiv(rows, chunk)
    device = x_BCDHW.device
    partial = torch.empty((batch, chunks, 2, channels), device=device)
    sums, back = (torch.empty((batch, 2, channels), device=device) for _ in range(2))
    dx = torch.empty_like(x_BCDHW)
    gradient_sums_kernel[(chunks, blocks, batch)](
        x_BCDHW, gradient_BCDHW, coefficients, partial, rows, channels, chunks,
        CHUNK=chunk, ROWS=ROWS, BLOCK=CHANNELS, SILU=silu,
    )  # fmt: skip
    gradient_coefficients_kernel[(groups, batch)](
        partial, coefficients, rstd, sums, back, rows, channels, groups, chunks,
        PARTS=32, WIDTH=triton.next_power_of_2(channels // groups),
    )  # fmt: skip
    input_gradient_kernel[(triton.cdiv(rows, ROWS), blocks, batch)](
        x_BCDHW, gradient_BCDHW, coefficients, back, dx, rows, channels, ROWS=ROWS, BLOCK=CHANNELS, SILU=silu
    )
    return dx, sums
