"""Objectives: closed forms, what each sample's loss may depend on, safety near t = 1, and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from diffusion.objectives import OBJECTIVES, build_objective
from diffusion.objectives.gaussian import Gaussian
from diffusion.objectives.noise_schedules import cosine_alpha_bar
from latentcache import InputError

NAMES = list(OBJECTIVES)
SHAPE = (3, 4, 5, 4, 4)
Model = Callable[[Tensor, Tensor], Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def silent(x: Tensor, t: Tensor) -> Tensor:
    """An untrained network."""
    return torch.zeros_like(x[:, :4])


def lively(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x[:, :4] - 0.5 * x[:, 4:]) * (1 + t.reshape(-1, 1, 1, 1, 1))


CLEAN, CONDITION, MASK = normal(1), normal(2), torch.ones(3, 1, 5, 4, 4)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_does_not_depend_on_its_batch_mates_or_their_order(name: str) -> None:
    objective = build_objective(name)
    together = objective.loss(lively, CLEAN, CONDITION, MASK, generators(10, 11, 12))
    for b in range(3):
        part = slice(b, b + 1)
        alone = objective.loss(lively, CLEAN[part], CONDITION[part], MASK[part], generators(10 + b))
        assert torch.equal(alone.t[0], together.t[b])
        assert torch.allclose(alone.per_sample[0], together.per_sample[b], rtol=1e-6)
        assert torch.allclose(alone.predicted_clean[0], together.predicted_clean[b], atol=1e-6)
    flipped = objective.loss(lively, CLEAN.flip(0), CONDITION.flip(0), MASK, generators(12, 11, 10))
    assert torch.allclose(flipped.per_sample.flip(0), together.per_sample, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_counts_valid_voxels_only(name: str) -> None:
    """Padding must not move the loss: a system before this one saw swings of 40 times."""
    objective = build_objective(name)
    mask = MASK.clone()
    mask[:, :, :, 2:] = 0
    spoiled = CLEAN.clone()
    spoiled[:, :, :, 2:] = 1e3

    def pointwise(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x[:, :4] + 0.1 * x[:, 4:]

    whole = objective.loss(pointwise, CLEAN, CONDITION, mask, generators(1, 2, 3)).per_sample
    assert torch.equal(objective.loss(pointwise, spoiled, CONDITION, mask, generators(1, 2, 3)).per_sample, whole)
    # A mean, not a sum: equal errors everywhere give the same loss under any mask.
    target = torch.full_like(CLEAN, 2.0)
    noise, t = torch.zeros_like(CLEAN), torch.full((3,), 0.5)
    full = objective.loss(silent, target, torch.zeros_like(CLEAN), MASK, noise_BCDHW=noise, t_B=t).per_sample
    part = objective.loss(silent, target, torch.zeros_like(CLEAN), mask, noise_BCDHW=noise, t_B=t).per_sample
    assert torch.allclose(full, part)


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_valid_voxels_costs_nothing(name: str) -> None:
    loss = build_objective(name).loss(lively, CLEAN, CONDITION, torch.zeros_like(MASK), generators(1, 2, 3))
    assert torch.equal(loss.per_sample, torch.zeros(3))


@pytest.mark.parametrize("name", ["epsilon", "v", "flow"])
@given(t=st.floats(0, 1), seed=st.integers(0, 10))
@settings(max_examples=25, deadline=None)
def test_estimates_always_add_up_to_what_was_seen(name: str, t: float, seed: int) -> None:
    """x = alpha y + sigma noise holds for the predicted pair at every time, both ends included."""
    objective = build_objective(name)
    assert isinstance(objective, Gaussian)
    t_B = torch.full((3,), t)
    x = normal(seed)
    y, noise = objective.predict(lively, x, CONDITION, t_B)
    alpha, sigma = (v.reshape(-1, 1, 1, 1, 1) for v in objective.schedule.alpha_sigma(t_B))
    assert torch.allclose(alpha * y + sigma * noise, x, atol=1e-5)
    assert bool(torch.isfinite(y).all() and torch.isfinite(noise).all())


def oracle(name: str, y: Tensor, noise: Tensor, step: int) -> Model:
    """The network that knows the answer, in the objective's native output."""
    a = cosine_alpha_bar(1000)[step].sqrt().float()
    s = (1 - cosine_alpha_bar(1000)[step]).sqrt().float()
    answers = {"epsilon": noise, "v": a * noise - s * y, "flow": noise - y, "bridge": y}
    return lambda x, t: answers[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("residual", [True, False])
def test_a_network_that_knows_the_answer_has_no_loss(name: str, residual: bool) -> None:
    extra: dict[str, Any] = {} if name == "bridge" else {"residual": residual, "output": "native"}
    if name == "bridge" and not residual:
        extra = {"sigma": 0.0}
    objective = build_objective(name, residual_std=0.25, **extra)
    noise = normal(3)
    y = (CLEAN - CONDITION) / 0.25 if residual or name == "bridge" else CLEAN
    terms = objective.loss(
        oracle(name, y, noise, 600), CLEAN, CONDITION, MASK, noise_BCDHW=noise, t_B=torch.full((3,), 0.6)
    )
    assert float(terms.per_sample.max()) < 1e-9
    assert torch.allclose(terms.predicted_clean, CLEAN, atol=1e-4)


def test_noising_equals_diffusers() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    steps = torch.tensor([0, 400, 990])
    seen: list[Tensor] = []

    def look(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x[:, :4])
        return torch.zeros_like(x[:, :4])

    noise = normal(3)
    objective = build_objective("epsilon", residual=False, output="native")
    terms = objective.loss(look, CLEAN, CONDITION, MASK, noise_BCDHW=noise, t_B=steps / 1000)
    assert torch.allclose(seen[0], theirs.add_noise(CLEAN, noise, steps), atol=1e-5)
    snr = theirs.alphas_cumprod[steps] / (1 - theirs.alphas_cumprod[steps])
    weight = torch.minimum(snr, torch.tensor(5.0)) / snr
    assert torch.allclose(terms.per_sample, weight * noise.square().flatten(1).mean(1), rtol=2e-3)
    v = build_objective("v", residual=False, output="native", min_snr_gamma=5.0)
    terms = v.loss(look, CLEAN, CONDITION, MASK, noise_BCDHW=noise, t_B=steps / 1000)
    wanted = theirs.get_velocity(CLEAN, noise, steps).square().flatten(1).mean(1)
    assert torch.allclose(terms.per_sample, torch.minimum(snr, torch.tensor(5.0)) / (snr + 1) * wanted, rtol=2e-3)


def test_all_gaussian_losses_weigh_one_error_of_y() -> None:
    """With the same network output, epsilon's and v's weighted losses differ by the known factor only."""
    noise, t = normal(3), torch.tensor([0.1, 0.5, 0.9])
    common = {"noise_BCDHW": noise, "t_B": t}
    epsilon = build_objective("epsilon", min_snr_gamma=None).loss(lively, CLEAN, CONDITION, MASK, **common)
    v = build_objective("v", min_snr_gamma=None).loss(lively, CLEAN, CONDITION, MASK, **common)
    alpha_bar = cosine_alpha_bar(1000)[(t * 1000).round().long()].float()
    assert torch.allclose(epsilon.per_sample, alpha_bar * v.per_sample, rtol=1e-4)
    assert torch.allclose(epsilon.predicted_clean, v.predicted_clean, atol=1e-5)
    # Hang et al. 2023: the min-SNR weight is one weighting of y's error, whatever is predicted.
    weighted = [
        build_objective(name, min_snr_gamma=5.0).loss(lively, CLEAN, CONDITION, MASK, **common)
        for name in ("epsilon", "v")
    ]
    assert torch.allclose(weighted[0].per_sample, weighted[1].per_sample, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("t", [0.0, 0.999])
def test_both_ends_of_t_are_safe_in_half_precision(name: str, dtype: torch.dtype, t: float) -> None:
    """A system before this one divided by 0.07 at t = 999 in half precision: NaN voxels under a fine loss."""
    objective = build_objective(name)
    half: Model = lambda x, t: lively(x.to(dtype), t.to(dtype))  # noqa: E731
    clean = CLEAN.to(dtype).requires_grad_()
    terms = objective.loss(half, clean, CONDITION.to(dtype), MASK, noise_BCDHW=normal(3), t_B=torch.full((3,), t))
    assert terms.per_sample.dtype == terms.predicted_clean.dtype == torch.float32
    assert bool(torch.isfinite(terms.per_sample).all())
    assert bool(torch.isfinite(terms.predicted_clean).all())
    assert float(terms.predicted_clean.detach().abs().max()) < 20
    terms.per_sample.sum().backward()
    assert clean.grad is not None
    assert bool(torch.isfinite(clean.grad).all())


def test_what_the_older_system_computed_is_not_finite() -> None:
    """So that the test above is known to test something."""
    alpha = cosine_alpha_bar(1000)[999].sqrt().half()
    naive = (normal(1).half() - normal(2).half()) / alpha
    assert not bool(torch.isfinite(naive).all())


def test_predictions_at_high_noise_are_marked_meaningless() -> None:
    t = torch.tensor([0.1, 0.5, 0.999])
    for name in ("epsilon", "v", "flow"):
        terms = build_objective(name).loss(lively, CLEAN, CONDITION, MASK, noise_BCDHW=normal(3), t_B=t)
        assert terms.clean_is_meaningful.tolist() == [True, True, False]
    terms = build_objective("bridge").loss(lively, CLEAN, CONDITION, MASK, noise_BCDHW=normal(3), t_B=t)
    assert terms.clean_is_meaningful.all()


@pytest.mark.parametrize("steps", [1, 3])
def test_an_untrained_one_step_bridge_is_the_condition_bit_for_bit(steps: int) -> None:
    out = build_objective("bridge").sample(silent, CONDITION, num_inference_steps=steps)
    # The last step returns the network's estimate, which is zero whatever noise the steps before it added.
    assert torch.equal(out, CONDITION)


def test_bridge_times_anchor_at_one() -> None:
    objective = build_objective("bridge", anchor=0.25)
    shape = (400, 1, 1, 1, 1)
    one = torch.zeros(shape)
    t = objective.loss(lambda x, t: x[:, :1], one, one, one, generators(*range(400))).t
    assert float((t == 1).float().mean()) == pytest.approx(0.25, abs=0.07)
    assert float(t[t < 1].mean()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("name", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("output", ["v", "native"])
def test_sampling_recovers_the_data_with_an_ideal_network(name: str, output: str) -> None:
    """Data y ~ N(0, 1) given the condition: the exact denoiser's samples have that spread about the condition."""
    objective = build_objective(name, residual_std=0.5, output=output)
    assert isinstance(objective, Gaussian)

    def ideal(x: Tensor, t: Tensor) -> Tensor:
        a, s = (v.reshape(-1, 1, 1, 1, 1) for v in objective.schedule.alpha_sigma(t))
        seen = x[:, :4]
        if output == "v":
            return torch.zeros_like(seen)
        y, noise = a * seen / (a**2 + s**2), s * seen / (a**2 + s**2)
        return {"epsilon": noise, "v": a * noise - s * y, "flow": noise - y}[name]

    condition = normal(2, 1, 4, 8, 16, 16)
    for sampler in objective.samplers:
        out = objective.sample(
            ideal, condition, sampler=sampler, num_inference_steps=50, generator=torch.Generator().manual_seed(0)
        )
        residual = out - condition
        assert float(residual.std()) == pytest.approx(0.5, rel=0.06)
        assert float(residual.mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_sampling_repeats_with_the_seed(name: str) -> None:
    objective = build_objective(name)

    def draw(seed: int) -> Tensor:
        return objective.sample(lively, CONDITION, num_inference_steps=4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("name", NAMES)
def test_settings_build_the_same_objective(name: str) -> None:
    objective = build_objective(name, residual_std=0.3)
    again = build_objective(name, **objective.settings())
    assert again.settings() == objective.settings()
    assert objective.settings()["residual_std"] == 0.3


def test_what_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="epsilon, v, flow, bridge"):
        build_objective("ddpm")
    with pytest.raises(InputError, match="min_snr_gamma"):
        build_objective("epsilon", min_snr=5)
    with pytest.raises(InputError, match="euler, ddim"):
        build_objective("bridge").sample(silent, CONDITION, sampler="heun")
    with pytest.raises(InputError, match="positive"):
        build_objective("flow", residual_std=0.0)
    with pytest.raises(InputError, match="native"):
        build_objective("v", output="x0")
    with pytest.raises(ValueError, match="one generator a sample"):
        build_objective("v").loss(lively, CLEAN, CONDITION, MASK, generators(1))


GOLDEN = {
    "epsilon": [0.0493043, 1.33383, 0.0184619],
    "v": [1.1916, 2.70946, 3.17207],
    "flow": [1.27233, 5.40776, 3.46048],
    "bridge": [0.312316, 0.52254, 1.20488],
}


@pytest.mark.parametrize("name", NAMES)
def test_golden_losses(name: str) -> None:
    """Computed once by this code on inputs from a formula; any change of an objective shows here."""
    wave = torch.sin(torch.arange(CLEAN.numel(), dtype=torch.float64) * 0.61).float().reshape(SHAPE)
    terms = build_objective(name).loss(
        lively,
        wave,
        0.8 * wave.flip(2),
        MASK,
        noise_BCDHW=torch.cos(3 * wave),
        t_B=torch.tensor([0.05, 0.5, 0.95]),
    )
    assert terms.per_sample.tolist() == pytest.approx(GOLDEN[name], rel=1e-4)
