"""Noise levels: how much signal and noise a diffusion time holds. x_t = alpha(t) x_0 + sigma(t) noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentcache import InputError


@dataclass(frozen=True)
class Level:
    """One noise level: the time ``t`` in [0, 1] that the network gets, and the level's alpha and sigma."""

    t: float
    alpha: float
    sigma: float


CLEAN = Level(t=0.0, alpha=1.0, sigma=0.0)


def cosine_alpha_bar(steps: int) -> Tensor:
    """Cumulative signal power of the cosine schedule (Nichol and Dhariwal 2021, equation 17), float64, ``(steps,)``.

    Single-step betas are capped at 0.999, which leaves 2.4e-9 of the signal's power at step 999: dividing by its root,
    5e-5, is what the samplers and losses here avoid.
    """

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((i + 1) / steps) / f(i / steps), 0.999) for i in range(steps)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


class CosineSchedule:
    """The discrete variance-preserving schedule: alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)."""

    straight = False

    def __init__(self, steps: int = 1000) -> None:
        if steps < 2:
            raise InputError(f"{steps} diffusion steps", expected="at least 2", remedy="The usual number is 1000.")
        self.steps = steps
        alpha_bar = cosine_alpha_bar(steps)
        self.alpha_bar = alpha_bar
        self._alpha = alpha_bar.sqrt().float()
        self._sigma = (1 - alpha_bar).sqrt().float()

    def draw(self, generator: torch.Generator) -> float:
        """A training time: uniform over the steps."""
        return int(torch.randint(self.steps, (), generator=generator, device=generator.device)) / self.steps

    def alpha_sigma(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float32, ``(B,)``, of times that are multiples of 1 / steps."""
        index = (t_B.double() * self.steps).round().long().clamp(0, self.steps - 1)
        return self._alpha.to(t_B.device)[index], self._sigma.to(t_B.device)[index]

    def level(self, step: int) -> Level:
        """The level of a step, 0 .. steps - 1."""
        return Level(step / self.steps, float(self.alpha_bar[step].sqrt()), float((1 - self.alpha_bar[step]).sqrt()))

    def levels(self, count: int, *, least_alpha: float = 0.0) -> list[Level]:
        """``count`` levels from the noisiest down, then the clean one.

        The noisiest is the last step whose alpha is at least ``least_alpha``: with less signal than that, estimating
        the clean latent by division amplifies the network's error more than it is worth.
        """
        _check_count(count, self.steps)
        top = int((self.alpha_bar.sqrt() >= least_alpha).sum()) - 1
        # "Trailing" spacing (Lin et al. 2024, table 2): starts where noise is all there is.
        chosen = [round((top + 1) * (count - i) / count) - 1 for i in range(count)]
        return [self.level(step) for step in chosen] + [CLEAN]


class StraightSchedule:
    """Rectified flow's straight line: alpha = 1 - t, sigma = t (Liu et al. 2023, equation 1, time reversed)."""

    straight = True

    def draw(self, generator: torch.Generator) -> float:
        """A training time: uniform on [0, 1)."""
        return float(torch.rand((), generator=generator, device=generator.device))

    def alpha_sigma(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, float32, ``(B,)``."""
        return 1 - t_B.float(), t_B.float()

    def levels(self, count: int, *, least_alpha: float = 0.0) -> list[Level]:
        """``count`` equally spaced levels from t = 1 - ``least_alpha`` down, then the clean one."""
        _check_count(count, 100_000)
        top = 1.0 - least_alpha
        times = [top * (count - i) / count for i in range(count)]
        return [Level(t, 1 - t, t) for t in times] + [CLEAN]


Schedule = CosineSchedule | StraightSchedule


def bridge_times(count: int) -> Sequence[float]:
    """``count`` + 1 equally spaced times from 1 (the condition) to 0 (the clean latent)."""
    _check_count(count, 100_000)
    return [(count - i) / count for i in range(count + 1)]


def _check_count(count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise InputError(
            f"{count} inference steps", expected=f"between 1 and {most}", remedy="Change num_inference_steps."
        )
