from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from diffusion.config import OptimiserConfig
from diffusion.training import build_adamw
from diffusion.training.optimiser import learning_rate


def test_a_cosine_begins_with_a_warm_up_and_ends_at_its_final_fraction() -> None:
    settings = OptimiserConfig(learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    rates = [learning_rate(settings, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(0.09 * math.pi))))
    assert rates[50] == pytest.approx(2.0 * 0.55)
    assert rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert learning_rate(settings, 500, 100) == pytest.approx(0.2), "beyond the end it stays there"


def test_a_constant_rate_knows_nothing_of_the_runs_length() -> None:
    settings = OptimiserConfig(learning_rate=3.0, schedule="constant", warmup_steps=2)
    assert [learning_rate(settings, step, total) for step, total in ((0, 5), (1, 5), (4, 5), (400, 5))] == [
        1.5,
        3,
        3,
        3,
    ]


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    settings = OptimiserConfig(learning_rate=0.5, betas=(0.8, 0.95), weight_decay=0.3)
    optimiser = build_adamw(module, settings, torch.device("cpu"))
    (group,) = optimiser.param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in module[1].parameters()}
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.8, 0.95), 0.3)
