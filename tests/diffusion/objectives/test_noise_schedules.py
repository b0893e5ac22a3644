"""Noise schedules against their closed forms and an independent implementation."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffusion.objectives.noise_schedules import CLEAN, CosineSchedule, StraightSchedule, bridge_times, cosine_alpha_bar
from latentcache import InputError


def test_cosine_schedule_equals_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert torch.allclose(cosine_alpha_bar(1000).float(), theirs, rtol=2e-4)
    assert cosine_alpha_bar(1000).dtype == torch.float64


def test_cosine_schedule_equals_its_closed_form_before_the_cap() -> None:
    u = (np.arange(1, 990) / 1000 + 0.008) / 1.008 * np.pi / 2
    wanted = np.cos(u) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert np.allclose(cosine_alpha_bar(1000)[:989].numpy(), wanted, rtol=1e-9)


def test_the_last_step_holds_almost_no_signal() -> None:
    assert 1e-5 < float(cosine_alpha_bar(1000)[-1].sqrt()) < 1e-4


@given(count=st.integers(1, 1000), least=st.sampled_from([0.0, 0.02, 0.3]))
@settings(max_examples=60, deadline=None)
def test_cosine_levels_fall_to_the_clean_one(count: int, least: float) -> None:
    try:
        levels = CosineSchedule().levels(count, least_alpha=least)
    except InputError:
        pytest.fail("every count up to the number of steps is possible")
    assert len(levels) == count + 1
    assert levels[-1] == CLEAN
    assert all(a.sigma >= b.sigma for a, b in pairwise(levels))
    assert all(abs(level.alpha**2 + level.sigma**2 - 1) < 1e-9 for level in levels)
    assert levels[0].alpha >= least


def test_levels_and_training_times_agree() -> None:
    schedule = CosineSchedule(1000)
    levels = schedule.levels(50)[:-1]
    alpha, sigma = schedule.alpha_sigma(torch.tensor([level.t for level in levels]))
    assert torch.allclose(alpha, torch.tensor([level.alpha for level in levels]))
    assert torch.allclose(sigma, torch.tensor([level.sigma for level in levels]))


def test_cosine_times_are_drawn_from_every_step() -> None:
    schedule = CosineSchedule(4)
    generator = torch.Generator().manual_seed(0)
    drawn = {schedule.draw(generator) for _ in range(200)}
    assert drawn == {0.0, 0.25, 0.5, 0.75}


def test_straight_levels_are_equally_spaced() -> None:
    levels = StraightSchedule().levels(4)
    assert [level.t for level in levels] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert all(level.alpha == 1 - level.t and level.sigma == level.t for level in levels)


def test_bridge_times_run_from_the_condition_to_the_clean_latent() -> None:
    assert bridge_times(1) == [1.0, 0.0]
    assert bridge_times(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("count", [0, -1, 1001])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(InputError, match="num_inference_steps"):
        CosineSchedule(1000).levels(count)
