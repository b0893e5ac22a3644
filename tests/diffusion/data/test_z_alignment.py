"""Latents aligned along z by position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffusion.data import align_depth, same_extent
from latentcache import InputError


def ramp(z: list[float] | np.ndarray) -> torch.Tensor:
    """A latent whose channels are linear in z: 2 z + 1 and -z."""
    z = torch.as_tensor(np.asarray(z), dtype=torch.float32)
    return torch.stack([2 * z + 1, -z])[:, :, None, None].expand(-1, -1, 2, 3)


@given(
    n=st.integers(2, 12),
    start=st.floats(-500, 500),
    step=st.floats(0.5, 20),
    wanted=st.lists(st.floats(0, 1), min_size=1, max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_a_linear_latent_is_reproduced_at_any_position(n: int, start: float, step: float, wanted: list[float]) -> None:
    z_from = start + step * np.arange(n)
    z_to = z_from[0] + np.asarray(wanted) * (z_from[-1] - z_from[0])
    found = align_depth(ramp(z_from), z_from, z_to)
    assert torch.allclose(found, ramp(z_to), atol=2e-3)


def test_unequal_gaps_are_interpolated_by_position() -> None:
    found = align_depth(ramp([0.0, 1.0, 5.0]), [0.0, 1.0, 5.0], [0.25, 3.0, 4.0])
    assert torch.allclose(found, ramp([0.25, 3.0, 4.0]))


def test_coinciding_positions_give_the_slices_bit_for_bit() -> None:
    latent = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0)) * 1e3
    z = [3.0 * j + 0.7 for j in range(6)]
    assert torch.equal(align_depth(latent, z, z), latent)
    assert torch.equal(align_depth(latent, z, z[2:4]), latent[:, 2:4])


def test_ends_are_held_and_nothing_is_extrapolated() -> None:
    found = align_depth(ramp([0.0, 1.0]), [0.0, 1.0], [-50.0, 0.5, 9.0])
    assert torch.allclose(found, ramp([0.0, 0.5, 1.0]))


def test_one_slice_is_repeated() -> None:
    assert torch.equal(align_depth(ramp([2.0]), [2.0], [0.0, 2.0, 7.0]), ramp([2.0, 2.0, 2.0]))


def test_thick_and_thin_latents_meet_by_position_not_by_index_ratio() -> None:
    """49 slices of 5 mm against 388 of 1 mm: latent 0 of both covers other millimetres, the extents differ."""
    z_thick = -100 + 5 * (4 * np.arange(13) + 1.5)
    z_thin = -180 + 1.0 * (4 * np.arange(97) + 1.5)
    found = align_depth(ramp(z_thick), z_thick, z_thin)
    inside = (z_thin >= z_thick[0]) & (z_thin <= z_thick[-1])
    assert inside.sum() < len(z_thin)
    assert torch.allclose(found[:, torch.as_tensor(inside)], ramp(z_thin[inside]), atol=1e-3)


@pytest.mark.parametrize(
    "positions", [[0.0, 1.0], [0.0, 2.0, 1.0], [0.0, 1.0, 1.0], [0.0, float("nan"), 2.0], [2.0, 1.0, 0.0]]
)
def test_positions_that_do_not_describe_the_latent_are_refused(positions: list[float]) -> None:
    with pytest.raises(InputError, match="ascending"):
        align_depth(ramp([0.0, 1.0, 2.0]), positions, [0.5])


def test_equal_extents_are_filled_by_centres() -> None:
    thick, thin = same_extent(2, 4)
    assert thick == [0.25, 0.75]
    assert thin == [0.125, 0.375, 0.625, 0.875]
    with pytest.raises(InputError, match="target_depth"):
        same_extent(3, 0)
