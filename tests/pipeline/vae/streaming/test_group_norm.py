"""Statistics gathered in parts equal those of the whole, whatever the parts and however large the mean."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from pipeline.vae.streaming.group_norm import Affine, ChannelMoments


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 9), max_size=4),
    channels=st.sampled_from([4, 8, 32]),
    offset=st.sampled_from([0.0, -3.0, 1000.0]),
)
def test_merged_moments_equal_those_of_the_whole(cuts: list[int], channels: int, offset: float) -> None:
    x = torch.randn(10, 7, 9, channels, generator=torch.Generator().manual_seed(0)) + offset
    moments = ChannelMoments(channels)
    edges = sorted({0, 10, *cuts})
    for start, stop in pairwise(edges):
        moments.add(x[start:stop])
    exact = x.double().view(-1, channels)
    assert moments.count == len(exact)
    torch.testing.assert_close(moments.mean, exact.mean(dim=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.m2 / moments.count, exact.var(dim=0, unbiased=False), rtol=1e-4, atol=0)


def test_slices_with_gaps_between_them() -> None:
    """The halves of a wider activation, as the decoder's in-place split makes them."""
    wide = torch.randn(4, 2, 8, 8, 16, generator=torch.Generator().manual_seed(1))
    moments = ChannelMoments(16)
    moments.add(wide[:, 1])
    torch.testing.assert_close(moments.mean, wide[:, 1].double().mean(dim=(0, 1, 2)), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("silu", [True, False])
def test_affine_is_group_norm(silu: bool) -> None:
    x = torch.randn(5, 6, 7, 16, generator=torch.Generator().manual_seed(2)) * 3 + 2
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    moments = ChannelMoments(16)
    moments.add(x)
    out = torch.empty_like(x)
    with torch.no_grad():
        expected = norm(x.double().permute(3, 0, 1, 2)[None].float())[0].permute(1, 2, 3, 0)
        Affine(*moments.affine(norm), 7, silu=silu).apply(x, out)
    torch.testing.assert_close(out, nn.functional.silu(expected) if silu else expected, rtol=1e-5, atol=1e-5)


def test_a_constant_channel_has_no_variance() -> None:
    moments = ChannelMoments(8)
    moments.add(torch.full((3, 4, 4, 8), 7.25))
    assert moments.m2.abs().max() == 0
    scale, shift = moments.affine(nn.GroupNorm(8, 8, eps=1e-6))
    torch.testing.assert_close(7.25 * scale + shift, torch.zeros(8), rtol=0, atol=1e-3)
