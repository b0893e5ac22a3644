from __future__ import annotations

import numpy as np
from hypothesis import given, strategies as st

from diffusion.data import plan_epoch
from diffusion.data.epoch_plan import draw_seed, share_of_rank

buckets = st.lists(st.integers(0, 3), min_size=1, max_size=60).map(np.array)


@given(buckets, st.integers(1, 7), st.integers(0, 5), st.integers(0, 5))
def test_every_sample_once_and_one_shape_a_step(shapes: np.ndarray, per_step: int, seed: int, epoch: int) -> None:
    plan = plan_epoch(shapes, per_step, seed, epoch)
    assert sorted(plan.samples.tolist()) == list(range(len(shapes)))
    for k in range(len(plan)):
        step = plan.step(k)
        assert 1 <= len(step) <= per_step
        assert len({int(shapes[s]) for s in step}) == 1
    short = sum(len(plan.step(k)) < per_step for k in range(len(plan)))
    assert short <= len(set(shapes.tolist())), "at most one left-over step a shape"


def test_same_seed_same_order_and_epochs_differ() -> None:
    shapes = np.zeros(100, dtype=int)
    first = plan_epoch(shapes, 8, seed=3, epoch=0)
    assert np.array_equal(first.samples, plan_epoch(shapes, 8, seed=3, epoch=0).samples)
    assert not np.array_equal(first.samples, plan_epoch(shapes, 8, seed=3, epoch=1).samples)
    assert not np.array_equal(first.samples, plan_epoch(shapes, 8, seed=4, epoch=0).samples)


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 6))
def test_ranks_share_a_step_without_gap_or_overlap(n: int, batch: int, world: int) -> None:
    step = np.arange(n) + 100
    shares = [share_of_rank(step, batch, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1, "ranks that make unlike numbers of passes would hang"
    counted = [s for share in shares for m in share for s, w in zip(m.samples, m.weights, strict=True) if w == 1.0]
    assert sorted(counted) == step.tolist()
    assert all(1 <= len(m.samples) <= batch for share in shares for m in share)


def test_seeds_of_unlike_draws_differ() -> None:
    seeds = {
        draw_seed("noise", seed, epoch, key, r) for seed in (0, 1) for epoch in (0, 1) for key in "ab" for r in (0, 1)
    }
    assert len(seeds) == 16
    assert all(0 <= s < 2**63 for s in seeds)


def test_a_million_samples_are_planned() -> None:
    plan = plan_epoch(np.arange(1_000_000) % 7, 16, seed=0, epoch=0)
    assert len(plan.samples) == 1_000_000
    assert int(plan.samples.sum()) == 999_999 * 1_000_000 // 2
