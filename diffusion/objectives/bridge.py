"""Objectives: what the network learns and how it is sampled, for ``epsilon``, ``v``, ``flow`` and ``bridge``.

Times run from t = 0 (clean) to t = 1 (pure noise, or the condition for ``bridge``). Latents are whitened. With
``residual`` (the default) the diffused variable is y = (clean - condition) / residual_std: what the condition does
not already say, at unit scale. Without it y is the clean latent. Everything textbook holds in y.

Shapes: B batch, C latent channels, D depth, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusion.objectives.base import Model, Objective, spread
from diffusion.objectives.gaussian import Epsilon, Flow, VPrediction
from diffusion.objectives.noise_schedules import bridge_times
from diffusion.objectives.samplers import DrawNoise, bridge_implicit, brownian
from latentcache import InputError


class Bridge(Objective):
    """A Brownian bridge from the condition (t = 1) to the clean latent (t = 0); the network predicts y itself.

    x_t = (1 - t) y + sigma sqrt(t (1 - t)) noise in units of the residual, so x_1 = 0 is the condition. Without the
    noise any t < 1 would give the answer away, (x_t / (1 - t)), and nothing would be learned there. An untrained
    network (zero output) samples the condition, bit for bit. One step gives the posterior mean, the default; more
    steps give posterior samples. ``anchor`` is the share of samples trained at t = 1 exactly, where one step starts.
    """

    name = "bridge"
    samplers = ("euler", "ddim")
    default_steps = 1

    def __init__(self, *, sigma: float = 1.0, anchor: float = 0.5, **common: Any) -> None:
        super().__init__(residual=True, **common)
        if not (sigma >= 0 and 0 <= anchor <= 1):
            raise InputError(
                f"bridge sigma {sigma} and anchor {anchor}",
                expected="sigma of at least 0 and anchor in [0, 1]",
                remedy="The defaults are 1.0 and 0.5.",
            )
        self.sigma = sigma
        self.anchor = anchor

    def settings(self) -> dict[str, Any]:
        return {"sigma": self.sigma, "anchor": self.anchor, **self.common_settings()}

    def _draw_time(self, generator: torch.Generator) -> float:
        anchored, t = torch.rand(2, generator=generator, device=generator.device).tolist()
        return 1.0 if anchored < self.anchor else t

    def _terms(
        self, model: Model, y: Tensor, condition: Tensor, noise: Tensor, t_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        t = spread(t_B, y)
        x = (1 - t) * y + self.sigma * (t * (1 - t)).clamp(min=0).sqrt() * noise
        predicted = model(torch.cat([x, condition], dim=1), t_B).float()
        return (predicted - y).square(), predicted, torch.ones_like(t_B), torch.ones_like(t_B, dtype=torch.bool)

    def _sample_y(self, model: Model, condition: Tensor, sampler: str, steps: int, draw: DrawNoise) -> Tensor:
        def predict_clean(x: Tensor, t: float) -> Tensor:
            return model(torch.cat([x, condition], dim=1), torch.full((len(x),), t, device=x.device)).float()

        walk = bridge_implicit if sampler == "ddim" else brownian
        return walk(predict_clean, torch.zeros_like(condition), bridge_times(steps), self.sigma, draw)


OBJECTIVES: dict[str, type[Objective]] = {kind.name: kind for kind in (Epsilon, VPrediction, Flow, Bridge)}


def build_objective(name: str, **settings: Any) -> Objective:
    """The objective ``epsilon``, ``v``, ``flow`` or ``bridge`` with its settings.

    Common settings: ``residual`` (not for bridge), ``residual_std`` and ``channel_weights``. ``epsilon`` and ``v``:
    ``steps``, ``min_snr_gamma``; those and ``flow``: ``output``. ``bridge``: ``sigma``, ``anchor``. Raises
    :class:`InputError` for a name or a setting that does not exist.
    """
    if name not in OBJECTIVES:
        raise InputError(
            f"objective {name!r}", expected="one of " + ", ".join(OBJECTIVES), remedy="Choose one of these."
        )
    known = OBJECTIVES[name]().settings()
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise InputError(
            f"setting {unknown[0]!r} of objective {name!r}",
            expected="one of " + ", ".join(known),
            remedy="Remove it or choose the objective that has it.",
        )
    return OBJECTIVES[name](**settings)
