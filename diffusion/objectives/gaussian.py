"""Objectives that add Gaussian noise: ``epsilon``, ``v`` and ``flow``. Conventions in :mod:`.bridge`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from diffusion.objectives.base import Model, Objective, spread
from diffusion.objectives.noise_schedules import CosineSchedule, Level, Schedule, StraightSchedule
from diffusion.objectives.samplers import DrawNoise, ddim, heun
from latentcache import InputError


class Gaussian(Objective):
    """Objectives that add Gaussian noise to y: x_t = alpha y + sigma noise.

    With ``output="v"`` the network predicts v = alpha' noise - sigma' y of the normalised mixture, alpha' and sigma'
    being alpha and sigma over their norm, whatever the loss is measured on: both estimates are then sums of bounded
    terms, with no division at either end of t. ``output="native"`` predicts the objective's own target, as in the
    papers; for ``epsilon`` this divides by alpha, so sampling starts where alpha is still at least 0.02.
    """

    samplers = ("ddim", "euler", "heun")
    default_steps = 50
    schedule: Schedule
    least_alpha = 0.02
    meaningful_snr = 0.25

    def __init__(self, *, output: str = "v", **common: Any) -> None:
        super().__init__(**common)
        if output not in ("v", "native"):
            raise InputError(
                f"network output {output!r}", expected="'v' or 'native'", remedy="The default, 'v', is the stable one."
            )
        self.output = output

    def settings(self) -> dict[str, Any]:
        return {"output": self.output, "residual": self.residual, **self.common_settings()}

    @abstractmethod
    def _native(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(y, noise) from the network's output where it is the objective's own target."""

    @abstractmethod
    def _target(self, y: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The quantity whose squared error is the loss."""

    @abstractmethod
    def _weight(self, snr_B: Tensor) -> Tensor: ...

    def predict(self, model: Model, x: Tensor, condition: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """(y, noise), both float32, that the model reads from x at times t; x = alpha y + sigma noise holds."""
        return self._predict(model, x, condition, t_B, *self.schedule.alpha_sigma(t_B))

    def _predict(
        self, model: Model, x: Tensor, condition: Tensor, t_B: Tensor, alpha_B: Tensor, sigma_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        alpha, sigma = spread(alpha_B, x), spread(sigma_B, x)
        if self.output == "native":
            out = model(torch.cat([x, condition], dim=1), t_B).float()
            return self._native(x, out, alpha, sigma)
        norm = (alpha.square() + sigma.square()).sqrt()
        a, s, x = alpha / norm, sigma / norm, x / norm
        v = model(torch.cat([x, condition], dim=1), t_B).float()
        return a * x - s * v, s * x + a * v

    def _draw_time(self, generator: torch.Generator) -> float:
        return self.schedule.draw(generator)

    def _terms(
        self, model: Model, y: Tensor, condition: Tensor, noise: Tensor, t_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha_B, sigma_B = self.schedule.alpha_sigma(t_B)
        alpha, sigma = spread(alpha_B, y), spread(sigma_B, y)
        predicted, predicted_noise = self._predict(model, alpha * y + sigma * noise, condition, t_B, alpha_B, sigma_B)
        error = self._target(predicted, predicted_noise, alpha, sigma) - self._target(y, noise, alpha, sigma)
        snr_B = (alpha_B / sigma_B.clamp(min=1e-6)).square()
        return error.square(), predicted, self._weight(snr_B), snr_B >= self.meaningful_snr

    def _sample_y(self, model: Model, condition: Tensor, sampler: str, steps: int, draw: DrawNoise) -> Tensor:
        def predict(x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            t_B = torch.full((len(x),), level.t, device=x.device)
            alpha_B, sigma_B = torch.full_like(t_B, level.alpha), torch.full_like(t_B, level.sigma)
            return self._predict(model, x, condition, t_B, alpha_B, sigma_B)

        second_order = sampler == "heun"
        bounded = self.schedule.straight or (self.output == "v" and not second_order)
        levels = self.schedule.levels(steps, least_alpha=0.0 if bounded else self.least_alpha)
        if second_order:
            return heun(predict, draw(-1), levels, straight=self.schedule.straight)
        return ddim(predict, draw(-1), levels)


class Epsilon(Gaussian):
    """Noise prediction (Ho et al. 2020, equation 14) on the cosine schedule with min-SNR weighting.

    The weight min(snr, gamma) / snr on the noise's error is Hang et al. 2023, section 3.4.
    """

    name = "epsilon"

    def __init__(self, *, steps: int = 1000, min_snr_gamma: float | None = 5.0, **gaussian: Any) -> None:
        super().__init__(**gaussian)
        self.schedule: CosineSchedule = CosineSchedule(steps)
        self.min_snr_gamma = min_snr_gamma

    def settings(self) -> dict[str, Any]:
        return {"steps": self.schedule.steps, "min_snr_gamma": self.min_snr_gamma, **super().settings()}

    def _native(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return (x - sigma * out) / alpha, out

    def _target(self, y: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise

    def _weight(self, snr_B: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(snr_B)
        return snr_B.clamp(max=self.min_snr_gamma) / snr_B


class VPrediction(Epsilon):
    """v-prediction (Salimans and Ho 2022, appendix D) on the cosine schedule: v = alpha noise - sigma y.

    Unweighted, which is snr + 1 on y's own error, unless ``min_snr_gamma`` is given: its weight is then
    min(snr, gamma) / (snr + 1), and a network that outputs v has the very loss that ``epsilon`` gives it.
    """

    name = "v"

    def __init__(self, *, steps: int = 1000, min_snr_gamma: float | None = None, **gaussian: Any) -> None:
        super().__init__(steps=steps, min_snr_gamma=min_snr_gamma, **gaussian)

    def _native(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return alpha * x - sigma * out, sigma * x + alpha * out

    def _target(self, y: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * noise - sigma * y

    def _weight(self, snr_B: Tensor) -> Tensor:
        if self.min_snr_gamma is None:
            return torch.ones_like(snr_B)
        return snr_B.clamp(max=self.min_snr_gamma) / (snr_B + 1)


class Flow(Gaussian):
    """Rectified flow (Liu et al. 2023, equation 1): the velocity noise - y along x_t = (1 - t) y + t noise."""

    name = "flow"
    samplers = ("euler", "heun", "ddim")

    def __init__(self, **gaussian: Any) -> None:
        super().__init__(**gaussian)
        self.schedule: StraightSchedule = StraightSchedule()

    def _native(self, x: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return x - sigma * out, x + alpha * out

    def _target(self, y: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - y

    def _weight(self, snr_B: Tensor) -> Tensor:
        return torch.ones_like(snr_B)
