"""The memory layout and precision in which a network of 3-D convolutions runs on a GPU, for training and generation."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)


def channels_last(module: _M) -> _M:
    """Put convolution weights in channels-last order, in place; activations follow them.

    The order that tensor cores read: elsewhere cuDNN converts every activation there and back.
    """
    return module.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload,no-any-return]


def contiguous_weights(module: nn.Module) -> None:
    """Put weights in contiguous order, in place.

    Where one was channels-last, 5-D inputs become so in its stead, and the activations follow them as before.
    """
    was_channels_last = False
    for parameter in module.parameters():
        if not parameter.is_contiguous():
            was_channels_last |= parameter.dim() == 5
            parameter.data = parameter.data.contiguous()
    if was_channels_last:
        module.register_forward_pre_hook(_channels_last_inputs)


def _channels_last_inputs(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.contiguous(memory_format=torch.channels_last_3d) if isinstance(x, Tensor) and x.dim() == 5 else x
        for x in inputs
    )


def for_generation(module: _M, device: torch.device) -> _M:
    """Return a frozen network as it generates on a device.

    On a GPU that is the layout of training, with weights of convolutions and linear layers cast to bf16 once. Autocast
    casts frozen weights anew at every call (its cache is for weights that learn); the numbers are the same.
    """
    module = module.to(device)
    if device.type != "cuda":
        return module
    return cast_weights(channels_last(module), torch.bfloat16)


def cast_weights(module: _M, dtype: torch.dtype) -> _M:
    """Cast for good, in place, what autocast would cast at each call: convolutions and linear layers, not the norms."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv3d, nn.Linear)):
            layer.to(dtype)
    return module
