"""Every objective, with a real network and optimiser, learns a pair by heart and samples it back."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.networks import UNetConfig, build_unet
from diffusion.objectives import build_objective

CONFIG = UNetConfig(
    width=16, multipliers=(1, 2), blocks_per_level=1, attention_levels=(1,), heads=2, time_embedding=32, groups=4
)
BATCH, LEARNING_RATE = 4, 3e-3


def pair() -> tuple[Tensor, Tensor]:
    """A smooth clean latent at unit scale and its average along depth; (1, 4, 4, 8, 8) each."""
    clean = F.avg_pool3d(torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 3, 1, 1)
    clean = clean / clean.std()
    return clean, F.avg_pool3d(clean, (3, 1, 1), 1, (1, 0, 0))


def gain_after(name: str, steps: int) -> float:
    """How much closer to the clean latent than the condition one sample is, dB."""
    clean, condition = pair()
    residual_std = float((clean - condition).square().mean().sqrt())
    objective = build_objective(name, residual_std=residual_std)
    torch.manual_seed(0)
    model = build_unet(CONFIG)
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    expanded = [x.expand(BATCH, -1, -1, -1, -1) for x in (clean, condition)]
    mask = torch.ones(BATCH, 1, 4, 8, 8)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / steps)
        generators = [torch.Generator().manual_seed(step * BATCH + b) for b in range(BATCH)]
        optimiser.zero_grad()
        objective.loss(model, *expanded, mask, generators).per_sample.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    sampled = objective.sample(
        model,
        condition,
        num_inference_steps=objective.default_steps if name == "bridge" else 20,
        generator=torch.Generator().manual_seed(1),
    )
    return -10 * math.log10(float((sampled - clean).square().mean()) / residual_std**2)


def test_a_bridge_overfits_one_pair() -> None:
    assert gain_after("bridge", 80) > 12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["epsilon", "v", "flow"])
def test_noise_based_objectives_overfit_one_pair(name: str) -> None:
    assert gain_after(name, 300) > 8
