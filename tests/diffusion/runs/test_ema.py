from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.runs import PowerEma
from diffusion.runs.ema import gamma_of_relative_width


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_gamma_gives_the_relative_width(std: float) -> None:
    gamma = gamma_of_relative_width(std)
    s = np.linspace(0, 1, 2_000_001)
    weight = s**gamma / np.sum(s**gamma)
    mean = np.sum(weight * s)
    assert np.sqrt(np.sum(weight * (s - mean) ** 2)) == pytest.approx(std, rel=1e-3)


def test_average_follows_the_power_profile() -> None:
    """After n updates the average equals the sum over steps of (s/n)^gamma, normalised, to discretisation error."""
    module = nn.Linear(1, 1, bias=False)
    ema = PowerEma(module, 0.1)
    n = 2000
    values = np.sin(np.arange(1, n + 1) / 200)
    for step, value in enumerate(values, start=1):
        with torch.no_grad():
            module.weight.fill_(float(value))
        ema.update(step)
    weights = np.arange(1, n + 1) ** ema.gamma
    assert ema.average[0].item() == pytest.approx(float((weights * values).sum() / weights.sum()), abs=2e-3)


def test_first_update_forgets_the_initial_weights() -> None:
    module = nn.Linear(3, 2)
    ema = PowerEma(module, 0.1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    ema.update(1)
    assert all(torch.equal(a, p) for a, p in zip(ema.average, module.parameters(), strict=True))


def test_swapping_twice_changes_no_bit() -> None:
    module = nn.Linear(5, 5)
    ema = PowerEma(module, 0.1)
    with torch.no_grad():
        module.weight.mul_(1.2345)
    live, average = module.weight.clone(), ema.average[0].clone()
    ema.swap()
    assert torch.equal(module.weight, average)
    ema.swap()
    assert torch.equal(module.weight, live)
    assert torch.equal(ema.average[0], average)


@pytest.mark.parametrize("std", [0.0, 0.3, -1.0])
def test_impossible_width_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="relative width"):
        gamma_of_relative_width(std)
