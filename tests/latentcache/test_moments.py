"""Moments merge exactly, in any order and grouping."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st

from latentcache import Moments, merge_all, valid_latents


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=6),
    offset=st.floats(-1e4, 1e4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_partition_gives_the_moments_of_the_whole(sizes: list[int], offset: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [random.normal(offset, random.uniform(0.1, 3), (2, n)) for n in sizes]
    whole = np.concatenate(parts, axis=1)
    moments = [Moments.of(p) for p in parts]
    left = moments[0]
    for m in moments[1:]:
        left = left.merge(m)
    right = moments[-1]
    for m in reversed(moments[:-1]):
        right = m.merge(right)
    at_once = merge_all(np.array(sizes), np.array([m.mean for m in moments]), np.array([m.std for m in moments]))
    scale = max(1.0, abs(offset))
    for found in (left, right, at_once):
        assert found.count == whole.shape[1]
        np.testing.assert_allclose(found.mean, whole.mean(1), rtol=1e-12, atol=1e-12 * scale)
        np.testing.assert_allclose(found.std, whole.std(1), rtol=1e-9, atol=1e-9 * scale)


def test_a_row_gives_its_moments_back() -> None:
    moments = Moments.of(np.random.default_rng(0).normal(3, 2, (4, 100)))
    again = Moments.from_row(100, moments.mean, moments.std)
    np.testing.assert_allclose(again.m2, moments.m2, rtol=1e-14)
    empty = Moments(0, np.zeros(4), np.zeros(4))
    assert empty.merge(empty) is empty
    np.testing.assert_array_equal(empty.merge(moments).mean, moments.mean)


def test_a_latent_counts_where_it_holds_a_voxel() -> None:
    assert valid_latents((50, 512, 509)) == (13, 128, 128)
    assert valid_latents((1, 4, 5)) == (1, 1, 2)
