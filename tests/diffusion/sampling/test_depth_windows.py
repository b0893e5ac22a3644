"""Depth windows: cover, weights, and no seam."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings, strategies as st
from torch import Tensor

from diffusion.sampling.depth_windows import DepthWindows, blend_weights, window_starts
from latentcache import InputError

T = torch.zeros(1)


@given(depth=st.integers(1, 200), window=st.integers(1, 40), overlap=st.integers(0, 39))
@settings(max_examples=200, deadline=None)
def test_windows_cover_every_slice_with_the_overlap(depth: int, window: int, overlap: int) -> None:
    assume(overlap < window)
    starts = window_starts(depth, window, overlap)
    assert starts[0] == 0
    if depth <= window:
        assert starts == [0]
    else:
        assert starts[-1] + window == depth
        assert all(0 < b - a <= window - overlap for a, b in pairwise(starts))


@given(depth=st.integers(1, 60), window=st.integers(1, 20), seed=st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_a_network_that_looks_at_one_slice_only_is_not_changed(depth: int, window: int, seed: int) -> None:
    x = torch.randn(1, 2, depth, 2, 2, generator=torch.Generator().manual_seed(seed))
    found = DepthWindows(lambda x, t: torch.sin(x), window, window // 2)(x, T)
    assert torch.allclose(found, torch.sin(x), atol=1e-6)


def test_weights_are_symmetric_and_never_zero() -> None:
    for window in (1, 2, 7, 16):
        weights = blend_weights(window)
        assert torch.allclose(weights, weights.flip(0))
        assert float(weights.min()) > 0
        assert int(weights.argmax()) in (window // 2, (window - 1) // 2)


def edge_effect(x: Tensor, t: Tensor) -> Tensor:
    """A network at its worst: what it says drifts from one end of its window to the other."""
    return x + torch.linspace(-1, 1, x.shape[2])[None, None, :, None, None]


def test_no_seam_is_measurable_where_windows_meet() -> None:
    """No step between slices is larger than the network's own within one window; a hard cut is 15 times larger."""
    depth, window = 60, 16
    x = torch.zeros(1, 1, depth, 1, 1)
    own = 2 / (window - 1) + 1e-6
    for overlap in (4, 8, 12):
        blended = DepthWindows(edge_effect, window, overlap)(x, T).flatten()
        bound = own if overlap >= window // 2 else 4 * own
        assert float(blended.diff().abs().max()) <= bound
    cut = DepthWindows(edge_effect, 15, 0)(x, T).flatten()
    assert float(cut.diff().abs().max()) > 14 * own


def test_the_windows_of_a_longer_volume_see_the_same_slices() -> None:
    seen: list[Tensor] = []

    def look(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x

    x = torch.arange(20.0).reshape(1, 1, 20, 1, 1)
    assert torch.allclose(DepthWindows(look, 8, 4)(x, T), x)
    assert [int(part.flatten()[0]) for part in seen] == [0, 4, 8, 12]
    assert all(torch.equal(part.flatten(), torch.arange(8.0) + part.flatten()[0]) for part in seen)


@pytest.mark.parametrize(("window", "overlap"), [(0, 0), (4, 4), (4, -1)])
def test_windows_that_do_not_advance_are_refused(window: int, overlap: int) -> None:
    with pytest.raises(InputError, match="overlap"):
        window_starts(10, window, overlap)
    with pytest.raises(InputError, match="overlap"):
        DepthWindows(edge_effect, window, overlap)
