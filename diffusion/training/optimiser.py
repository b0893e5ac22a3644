"""AdamW and its learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from diffusion.config import OptimiserConfig


def build_adamw(module: nn.Module, settings: OptimiserConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over the parameters that learn."""
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=device.type == "cuda",
    )


def learning_rate(settings: OptimiserConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then constant or a cosine down to ``final_fraction`` at the run's last step."""
    rate = settings.learning_rate
    if settings.schedule == "cosine":
        share = min(1.0, step / max(1, total_steps))
        low = settings.final_fraction
        rate *= low + (1 - low) * 0.5 * (1 + math.cos(math.pi * share))
    return rate * min(1.0, (step + 1) / max(1, settings.warmup_steps))
