from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffusion.networks import column_attention as module
from diffusion.networks.blocks import DepthAttention


def attention() -> DepthAttention:
    torch.manual_seed(0)
    layer = DepthAttention(4, 2, 2)
    nn.init.normal_(layer.out.weight)
    return layer


def test_no_call_sees_more_columns_than_a_cuda_grid_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """512 x 512 slices at level 1 have 4096 columns a sample: sixteen samples are one too many."""
    real, seen = torch.nn.functional.scaled_dot_product_attention, []

    def watched(query: Any, key: Any, value: Any) -> Any:
        seen.append(len(query))
        return real(query, key, value)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        attention()(torch.zeros(16, 4, 1, 64, 64))
    assert max(seen) <= 65_535
    assert sum(seen) == 16 * 64 * 64


def test_chunks_change_no_output_and_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = attention(), torch.randn(2, 4, 5, 3, 3, requires_grad=True)
    outputs, gradients = [], []
    for most in (65_535, 18, 7):
        monkeypatch.setattr(module, "MOST_COLUMNS", most)
        x.grad = None
        out = layer(x)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(x.grad)
    for out, gradient in zip(outputs[1:], gradients[1:], strict=True):
        assert torch.allclose(out, outputs[0], atol=1e-6)
        assert torch.allclose(gradient, gradients[0], atol=1e-5)
