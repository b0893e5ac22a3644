"""Samplers against diffusers' schedulers, exact solutions and their orders of convergence."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion.objectives import DepthNoise
from diffusion.objectives.noise_schedules import CosineSchedule, Level, StraightSchedule, bridge_times
from diffusion.objectives.samplers import Predict, bridge_implicit, brownian, ddim, heun, require_finite
from latentcache import NonFiniteError

SHAPE = (1, 4, 3, 4, 4)


def start(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def epsilon_model(x: Tensor, t: float) -> Tensor:
    """Some smooth denoiser: what it says does not matter, only that both sides ask the same."""
    return torch.tanh(1.3 * x + t) * (0.4 + 0.5 * t) + 0.1 * x


def from_epsilon(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    noise = epsilon_model(x, level.t)
    return (x - level.sigma * noise) / level.alpha, noise


def test_ddim_equals_diffusers_over_fifty_steps() -> None:
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
    )
    theirs.set_timesteps(50)
    levels = CosineSchedule(1000).levels(50)
    assert [round(level.t * 1000) for level in levels[:-1]] == theirs.timesteps.tolist()
    # Start a little below step 999, where float32 arithmetic of either side still agrees to many digits.
    x = start()
    for t in theirs.timesteps[2:]:
        x = theirs.step(epsilon_model(x, float(t) / 1000), int(t), x).prev_sample
    assert torch.allclose(ddim(from_epsilon, start(), levels[2:]), x, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_heun_equals_diffusers() -> None:
    from diffusers import HeunDiscreteScheduler

    levels = CosineSchedule(1000).levels(20, least_alpha=0.02)
    theirs = HeunDiscreteScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    theirs.set_timesteps(timesteps=[round(level.t * 1000) for level in levels[:-1]])
    z = start() / levels[0].alpha
    for t in theirs.timesteps:
        z = theirs.step(epsilon_model(theirs.scale_model_input(z, t), float(t) / 1000), t, z).prev_sample
    assert torch.allclose(heun(from_epsilon, start(), levels, straight=False), z, rtol=1e-3, atol=1e-4)


def velocity_predict(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    velocity = epsilon_model(x, level.t)
    return x - level.sigma * velocity, x + level.alpha * velocity


def test_flow_euler_equals_diffusers() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    levels = StraightSchedule().levels(10)
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    theirs.set_timesteps(sigmas=[level.t for level in levels[:-1]])
    x = start()
    for t, level in zip(theirs.timesteps, levels, strict=False):
        x = theirs.step(epsilon_model(x, level.t), t, x).prev_sample
    assert torch.allclose(ddim(velocity_predict, start(), levels), x, atol=1e-5)


def test_flow_heun_equals_diffusers() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    theirs = FlowMatchHeunDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
    theirs.set_timesteps(10)
    sigmas = [float(theirs.sigmas[0]), *[float(s) for s in theirs.sigmas[1:-1:2]], 0.0]
    levels = [Level(s, 1 - s, s) for s in sigmas]
    x = start()
    for t, sigma in zip(theirs.timesteps, theirs.sigmas[: len(theirs.timesteps)], strict=True):
        x = theirs.step(epsilon_model(x, float(sigma)), t, x).prev_sample
    assert torch.allclose(heun(velocity_predict, start(), levels, straight=True), x, atol=1e-4)


MEAN, STD = 0.7, 0.3


def ideal(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """The exact posterior means for data N(MEAN, STD squared)."""
    variance = level.alpha**2 * STD**2 + level.sigma**2
    centred = (x - level.alpha * MEAN) / variance
    return MEAN + level.alpha * STD**2 * centred, level.sigma * centred


def largest_error(method: str, schedule: StraightSchedule | CosineSchedule, count: int, least_alpha: float) -> float:
    """Against the exact probability-flow map, x_1 to MEAN + STD (x_1 - alpha_1 MEAN) / sqrt(variance of x_1)."""
    levels = schedule.levels(count, least_alpha=least_alpha)
    x = start()
    top = levels[0]
    exact = MEAN + STD * (x - top.alpha * MEAN) / math.sqrt(top.alpha**2 * STD**2 + top.sigma**2)
    found = ddim(ideal, x, levels) if method == "euler" else heun(ideal, x, levels, straight=schedule.straight)
    return float((found - exact).abs().max())


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_flow_samplers_reach_the_exact_solution_at_their_order(method: str, order: int) -> None:
    coarse, fine = (largest_error(method, StraightSchedule(), n, 0.0) for n in (50, 100))
    assert fine < 0.05
    # The last step of Heun's method is Euler's, on an interval of 1 / n: its error is of second order too.
    assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_heun_beats_ddim_at_equal_network_calls_on_the_cosine_schedule() -> None:
    assert largest_error("heun", CosineSchedule(), 50, 0.02) < largest_error("euler", CosineSchedule(), 99, 0.02)
    assert largest_error("euler", CosineSchedule(), 200, 0.02) < 0.02


def posterior_mean(spread: float, sigma: float) -> Callable[[Tensor, float], Tensor]:
    """E[y | x_t] on the bridge x_t = (1 - t) y + sigma sqrt(t (1 - t)) noise for y ~ N(0, spread squared)."""
    return lambda x, t: spread**2 * x / ((1 - t) * spread**2 + sigma**2 * t)


@pytest.mark.parametrize("walk", [brownian, bridge_implicit])
@pytest.mark.parametrize(("spread", "sigma"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7)])
def test_bridge_samplers_draw_from_the_data(walk: Callable[..., Tensor], spread: float, sigma: float) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (1, 1, 1, 100, 100)
    draw = lambda _: torch.randn(shape, generator=generator)  # noqa: E731
    x = walk(posterior_mean(spread, sigma), torch.zeros(shape), bridge_times(200), sigma, draw)
    assert float(x.mean()) == pytest.approx(0.0, abs=0.05 * spread)
    assert float(x.std()) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("walk", [brownian, bridge_implicit])
def test_one_bridge_step_is_the_prediction_itself(walk: Callable[..., Tensor]) -> None:
    def never(_: int) -> Tensor:
        raise AssertionError("one step needs no noise")

    answer = start(5)
    assert torch.equal(walk(lambda x, t: answer, torch.zeros(SHAPE), bridge_times(1), 1.0, never), answer)


def test_brownian_steps_have_the_posterior_of_a_brownian_bridge() -> None:
    """p(x_s | x_t, x_0): mean (s/t) x_t + (1 - s/t) x_0, variance sigma^2 s (t - s) / t."""
    x_t = torch.full((1, 1, 1, 200, 200), 0.8)
    generator = torch.Generator().manual_seed(0)
    got: list[Tensor] = []

    def predict(x: Tensor, t: float) -> Tensor:
        got.append(x)
        return torch.full_like(x, -0.4)

    brownian(predict, x_t, [0.9, 0.3, 0.0], 0.5, lambda _: torch.randn(x_t.shape, generator=generator))
    x_s = got[1]
    assert float(x_s.mean()) == pytest.approx(0.8 / 3 - 0.4 * 2 / 3, abs=5e-3)
    assert float(x_s.var()) == pytest.approx(0.25 * 0.3 * 0.6 / 0.9, rel=0.03)


def test_latents_are_never_clamped() -> None:
    """A clean latent of 40 standard deviations comes out as such from every sampler."""
    far = torch.full(SHAPE, 40.0)

    def certain(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return far, (x - level.alpha * far) / level.sigma

    for levels in (StraightSchedule().levels(10), CosineSchedule().levels(10, least_alpha=0.02)):
        straight = levels[0].alpha == 0
        assert torch.allclose(ddim(certain, start(), levels), far)
        assert torch.allclose(heun(certain, start(), levels, straight=straight), far)
    assert torch.equal(brownian(lambda x, t: far, torch.zeros(SHAPE), bridge_times(5), 1.0, lambda _: start()), far)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_float32_even_when_the_start_is_not(dtype: torch.dtype) -> None:
    seen = []

    def predict(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        seen.append(x.dtype)
        return ideal(x, level)

    assert ddim(predict, start().to(dtype), StraightSchedule().levels(4)).dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_a_value_that_is_not_finite_stops_the_sampler_and_names_the_step() -> None:
    def broken(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        return (x / 0.0 if level.t < 0.6 else x), x

    predict: Predict = broken
    with pytest.raises(NonFiniteError, match="after sampler step 2"):
        ddim(predict, start(), StraightSchedule().levels(4))
    require_finite(start(), 0)


def test_noise_depends_on_absolute_depth_alone() -> None:
    whole = DepthNoise(seed=5)(3, (4, 10, 2, 2))
    part = DepthNoise(seed=5, first_depth=4)(3, (4, 3, 2, 2))
    assert torch.equal(whole[:, 4:7], part)
    assert not torch.equal(whole, DepthNoise(seed=6)(3, (4, 10, 2, 2)))
    assert not torch.equal(whole, DepthNoise(seed=5, sample=1)(3, (4, 10, 2, 2)))
    assert not torch.equal(whole, DepthNoise(seed=5)(4, (4, 10, 2, 2)))


def test_noise_is_standard_normal_and_white_along_depth() -> None:
    x = DepthNoise(seed=0)(-1, (4, 64, 16, 16))
    assert float(x.mean()) == pytest.approx(0, abs=0.02)
    assert float(x.std()) == pytest.approx(1, abs=0.02)
    assert float((x[:, 1:] * x[:, :-1]).mean()) == pytest.approx(0, abs=0.02)
