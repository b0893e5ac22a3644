"""GroupNorm, modulation and SiLU in one pass where that pays: on a GPU, in channels-last order, by Triton.

PyTorch's GroupNorm has no channels-last kernel on CUDA before 2.14: every call converts to the contiguous order and the
convolution behind it converts back; the modulation and SiLU are further passes, each of which keeps a tensor for the
backward pass. Fused, the backward pass keeps the input alone. Where a kernel does not apply (a CPU, another layout,
inside `torch.compile`, no Triton, a device on which it does not agree with PyTorch) the caller's own PyTorch operations
run, which are also what the kernels are tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from latentcache import triton_agrees

_ASSUMED: ContextVar[bool | None] = ContextVar("fused norm assumed", default=None)


@contextmanager
def assume_fused(fused: bool = True) -> Iterator[None]:
    """Inside, the kernels run (or do not), whatever the device.

    For Triton's interpreter on a CPU, for counting on shapes what a GPU will keep, and for comparing both paths.
    """
    before = _ASSUMED.set(fused)
    try:
        yield
    finally:
        _ASSUMED.reset(before)


def is_fused(x_BCDHW: Tensor) -> bool:
    """Whether `norm_act` may be called for this activation."""
    if torch.compiler.is_compiling():  # first: what follows would break a compiled block's graph in two
        return False
    assumed = _ASSUMED.get()
    if assumed is False or x_BCDHW.ndim != 5:
        return False
    if not x_BCDHW.is_contiguous(memory_format=torch.channels_last_3d) and not isinstance(x_BCDHW, FakeTensor):
        return False
    return bool(assumed) or (x_BCDHW.is_cuda and usable(x_BCDHW.device.index or 0))


def norm_act(norm: nn.GroupNorm, x_BCDHW: Tensor, modulation_B2C: Tensor | None = None, *, silu: bool = True) -> Tensor:
    """Return ``silu(norm(x) * (1 + scale) + shift)`` in the input's dtype and layout. Only where `is_fused`.

    The halves of ``modulation_B2C``, if given, are scale and shift.
    """
    if modulation_B2C is not None:
        modulation_B2C = modulation_B2C.contiguous()
    y: Tensor = _NormAct.apply(  # type: ignore[no-untyped-call]
        x_BCDHW, norm.weight, norm.bias, modulation_B2C, norm.num_groups, norm.eps, silu
    )
    return y


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        modulation: Tensor | None,
        groups: int,
        eps: float,
        silu: bool,
    ) -> Tensor:
        if isinstance(x, FakeTensor):  # counting on shapes
            y, rstd = torch.empty_like(x), x.new_empty((len(x), groups), dtype=torch.float32)
            coefficients = x.new_empty((len(x), 3, x.shape[1]), dtype=torch.float32)
        else:
            from diffusion.networks import triton_norm

            with _device_of(x):
                y, coefficients, rstd = triton_norm.forward(
                    x.detach(), weight.detach(), bias.detach(), None if modulation is None else modulation.detach(),
                    groups, eps, silu,
                )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, modulation, coefficients, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from diffusion.networks import triton_norm

        x, weight, bias, modulation, coefficients, rstd = ctx.saved_tensors
        # Its strides are what the consumer made of them; a dtype of its own it has where the consumer is not ours.
        gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last_3d)
        with _device_of(x):
            dx, sums = triton_norm.backward(x.detach(), gradient, coefficients, rstd, ctx.silu)
        plain, weighted = sums.unbind(1)  # (B, C) each: of dL/du, and of dL/du * xhat
        scaled = modulation is not None
        if scaled:
            one_plus = 1 + modulation.float().chunk(2, dim=1)[0]
            d_scale = weighted * weight.float() + plain * bias.float()
            d_modulation = torch.cat([d_scale, plain], dim=1).to(modulation.dtype)
            plain, weighted = plain * one_plus, weighted * one_plus
        d_weight, d_bias = weighted.sum(0).to(weight.dtype), plain.sum(0).to(bias.dtype)
        return dx, d_weight, d_bias, d_modulation if scaled else None, None, None, None


def _device_of(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device_of(x)  # type: ignore[no-untyped-call]


@lru_cache
def usable(index: int) -> bool:
    """Return whether Triton is there and agrees with PyTorch on this GPU; looked at once, on a small activation."""
    return triton_agrees(index, largest_difference, "normalisation")


def largest_difference(device: torch.device) -> float:
    """Of the kernels from PyTorch in float32, relative, over the result and every gradient of a small activation."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn((2, 48, 3, 4, 8), generator=random).to(device, memory_format=torch.channels_last_3d)
    modulation = torch.randn((2, 96), generator=random).to(device)
    norm = nn.GroupNorm(8, 48).to(device)
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.arange(48.0, device=device))
    found = []
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for fused in (True, False):
            inputs = [t.detach().requires_grad_() for t in (x, modulation)]
            scale, shift = inputs[1][:, :, None, None, None].chunk(2, dim=1)
            y = norm_act(norm, *inputs) if fused else F.silu(norm(inputs[0]) * (1 + scale) + shift)
            gradients = torch.autograd.grad(y.square().sum(), [*inputs, norm.weight, norm.bias])
            found.append([y.detach(), *gradients])
    pairs = zip(*found, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)
