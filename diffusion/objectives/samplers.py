"""Samplers: from noise to a clean latent, step by step. All arithmetic is float32; latents are never clamped.

``Predict`` is a denoiser at a noise level: ``predict(x, level) -> (x0, noise)``, both (B, C, D, H, W) float32, with
x = alpha x0 + sigma noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.objectives.noise_schedules import Level
from latentcache import NonFiniteError

Predict = Callable[[Tensor, Level], tuple[Tensor, Tensor]]
DrawNoise = Callable[[int], Tensor]
"""The ``i``-th noise tensor of one sampling run, shaped like the latent, float32."""


def ddim(predict: Predict, x_BCDHW: Tensor, levels: Sequence[Level]) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, equation 12 with eta = 0).

    It is Euler's method for the probability-flow equation: in x / alpha over sigma / alpha for a variance-preserving
    schedule, in t for a straight one. So ``euler`` is the same function.
    """
    x = x_BCDHW.float()
    for number, (now, after) in enumerate(pairwise(levels)):
        x0, noise = predict(x, now)
        x = after.alpha * x0 + after.sigma * noise
        require_finite(x, number)
    return x


def heun(predict: Predict, x_BCDHW: Tensor, levels: Sequence[Level], *, straight: bool) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1 without churn); the last step is Euler's.

    ``straight``: integrate dx/dt = noise - x0 over t (flows), else d(x / alpha) / d(sigma / alpha) = noise.
    """
    x = x_BCDHW.float()
    for number, (now, after) in enumerate(pairwise(levels)):
        x0, noise = predict(x, now)
        euler = after.alpha * x0 + after.sigma * noise
        if after.sigma == 0:
            x = euler
        else:
            x0_next, noise_next = predict(euler, after)
            if straight:
                velocity = 0.5 * ((noise - x0) + (noise_next - x0_next))
                x = x + (after.t - now.t) * velocity
            else:
                ratio_step = after.sigma / after.alpha - now.sigma / now.alpha
                x = after.alpha * (x / now.alpha + ratio_step * 0.5 * (noise + noise_next))
        require_finite(x, number)
    return x


def brownian(
    predict_clean: Callable[[Tensor, float], Tensor],
    x_BCDHW: Tensor,
    times: Sequence[float],
    sigma: float,
    draw: DrawNoise,
) -> Tensor:
    """Samples a Brownian bridge backwards: p(x_s | x_0, x_t) with x_0 as predicted (Liu et al. 2023, I2SB, eq. 4).

    x_s = (s / t) x_t + (1 - s / t) x_0 + sigma sqrt(s (t - s) / t) noise. With ``sigma`` 0 this is Euler's method for
    the flow from x_1 to x_0; with one step the result is the prediction at t = 1, the posterior mean.
    """
    x = x_BCDHW.float()
    for number, (t, s) in enumerate(pairwise(times)):
        clean = predict_clean(x, t)
        if s == 0:
            x = clean
        else:
            x = (s / t) * x + (1 - s / t) * clean
            if sigma > 0:
                x = x + sigma * (s * (t - s) / t) ** 0.5 * draw(number)
        require_finite(x, number)
    return x


def bridge_implicit(
    predict_clean: Callable[[Tensor, float], Tensor],
    x_BCDHW: Tensor,
    times: Sequence[float],
    sigma: float,
    draw: DrawNoise,
) -> Tensor:
    """The bridge's counterpart of DDIM (Zheng et al. 2024, DBIM, equation 14 with rho at its largest).

    x_s = (1 - s) x_0 + sigma sqrt(s (1 - s)) noise, where the noise is drawn once, at t = 1 where the bridge has none,
    and afterwards is what x_t says it was. x_1 must be zero: the bridge's variable is relative to its start.
    """
    x = x_BCDHW.float()
    for number, (t, s) in enumerate(pairwise(times)):
        clean = predict_clean(x, t)
        if s == 0:
            x = clean
        elif sigma == 0:
            x = (1 - s) * clean
        else:
            spread = sigma * (t * (1 - t)) ** 0.5
            noise = draw(number) if number == 0 else (x - (1 - t) * clean) / spread
            x = (1 - s) * clean + sigma * (s * (1 - s)) ** 0.5 * noise
        require_finite(x, number)
    return x


def require_finite(x: Tensor, step: int) -> None:
    """Raises :class:`NonFiniteError`, naming the sampler step, where a latent is NaN or infinite."""
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise NonFiniteError(
            f"{bad} non-finite values in the latent after sampler step {step}",
            expected="finite numbers",
            remedy="Check the condition's whitening and the checkpoint; sample in bf16 or float32, not float16.",
        )


@dataclass(frozen=True)
class DepthNoise:
    """Standard normal noise that depends on the seed, the sample, the draw and the absolute depth index alone.

    So a window, a longer volume and another device see the same noise at the same place. Each depth slice has a
    separate generator, on the CPU.
    """

    seed: int
    sample: int = 0
    first_depth: int = 0

    def __call__(self, draw: int, shape_CDHW: Sequence[int]) -> Tensor:
        """The ``draw``-th noise, (C, D, H, W) float32. Draw -1 is the start of the trajectory."""
        channels, depth, height, width = shape_CDHW
        slices = []
        for z in range(self.first_depth, self.first_depth + depth):
            text = f"{self.seed}/{self.sample}/{draw}/{z}".encode()
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1)
            slices.append(torch.randn((channels, height, width), generator=generator))
        return torch.stack(slices, dim=1)
