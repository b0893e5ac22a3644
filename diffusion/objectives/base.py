"""The interface that every training objective fills in: a loss a sample, and sampling.

See :mod:`diffusion.objectives.bridge` for the conventions.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion.objectives.samplers import DrawNoise
from latentcache import InputError

Model = Callable[[Tensor, Tensor], Tensor]
"""``model(x (B, 2C, D, H, W), t (B,)) -> (B, C, D, H, W)``: a :class:`UNet` or a wrapper of one."""


@dataclass(frozen=True)
class LossTerms:
    """One training step's results, a sample at a time.

    ``per_sample`` (B,) is the weighted mean squared error over the mask; ``predicted_clean`` (B, C, D, H, W) float32
    keeps its gradient; ``clean_is_meaningful`` (B,) bool says where the noise left enough for image losses on it.
    """

    per_sample: Tensor
    predicted_clean: Tensor
    t: Tensor
    clean_is_meaningful: Tensor


class Objective(ABC):
    """A training objective with its samplers. See :func:`build_objective`."""

    name: ClassVar[str]
    samplers: ClassVar[tuple[str, ...]]
    """Names that :meth:`sample` accepts, the default first."""
    default_steps: ClassVar[int]

    def __init__(
        self, *, residual: bool = True, residual_std: float = 0.5, channel_weights: Sequence[float] | None = None
    ) -> None:
        if not (residual_std > 0 and math.isfinite(residual_std)):
            raise InputError(
                f"residual_std {residual_std}",
                expected="a positive number: the standard deviation of whitened clean - condition",
                remedy="Measure it on the training split, or leave it at 0.5.",
            )
        weights = None if channel_weights is None else [float(w) for w in channel_weights]
        if weights is not None and not (weights and min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise InputError(
                f"channel_weights {weights}",
                expected="finite numbers of at least 0, not all 0, one a latent channel",
                remedy="Leave them away: training measures them on the decoder (losses.measure).",
            )
        self.residual = residual
        self.residual_std = residual_std
        self.channel_weights = weights
        """Weight of each channel's squared error, up to a factor: the loss is measured with a mean weight of 1."""

    def steps(self, num_inference_steps: int | None) -> int:
        """Sampler steps that are taken: those asked for, else the objective's own number."""
        return num_inference_steps or self.default_steps

    def common_settings(self) -> dict[str, Any]:
        """The part of :meth:`settings` that every objective has."""
        return {"residual_std": self.residual_std, "channel_weights": self.channel_weights}

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON-ready keyword arguments that build this objective again."""

    def loss(
        self,
        model: Model,
        clean_BCDHW: Tensor,
        condition_BCDHW: Tensor,
        mask_B1DHW: Tensor,
        generators: Sequence[torch.Generator] | None = None,
        *,
        noise_BCDHW: Tensor | None = None,
        t_B: Tensor | None = None,
    ) -> LossTerms:
        """Loss of each sample over its valid voxels.

        Args:
            generators: One generator a sample; its time and noise come from it alone, so that a sample's loss does not
                depend on its batch mates or on the rank that computes it.
            noise_BCDHW, t_B: Given instead of ``generators``.
        """
        clean, condition = clean_BCDHW.float(), condition_BCDHW.float()
        if noise_BCDHW is None or t_B is None:
            if generators is None or len(generators) != len(clean):
                raise ValueError("one generator a sample, or both noise and t")
            times = torch.tensor([self._draw_time(g) for g in generators], device=clean.device)
            noise = torch.stack(
                [torch.randn(clean.shape[1:], generator=g, device=g.device).to(clean.device) for g in generators]
            )
            t_B = times if t_B is None else t_B
            noise_BCDHW = noise if noise_BCDHW is None else noise_BCDHW
        squared, predicted, weight_B, meaningful_B = self._terms(
            model, self._to_y(clean, condition), condition, noise_BCDHW.float(), t_B.float()
        )
        if self.channel_weights is not None:
            weights = torch.tensor(self.channel_weights, device=squared.device)
            squared = squared * (weights / weights.mean()).reshape(1, -1, 1, 1, 1)
        mask = mask_B1DHW.to(squared.dtype)
        valid_B = (mask.flatten(1).sum(1) * squared.shape[1]).clamp(min=1.0)
        per_sample = weight_B * (squared * mask).flatten(1).sum(1) / valid_B
        return LossTerms(per_sample, self._from_y(predicted, condition), t_B, meaningful_B)

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        condition_BCDHW: Tensor,
        *,
        sampler: str | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        noise: DrawNoise | None = None,
    ) -> Tensor:
        """Clean whitened latents (B, C, D, H, W) float32 given the whitened condition.

        Args:
            sampler: One of :attr:`samplers`; the first by default.
            generator: Where noise comes from; or ``noise(i)``, the i-th tensor, -1 being the start.
        """
        sampler = sampler or self.samplers[0]
        if sampler not in self.samplers:
            raise InputError(
                f"sampler {sampler!r} with objective {self.name!r}",
                expected="one of " + ", ".join(self.samplers),
                remedy="Choose one of these, or a checkpoint of another objective.",
            )
        condition = condition_BCDHW.float()
        if noise is None:
            shape, source = condition.shape, generator

            def noise(_: int) -> Tensor:
                device = source.device if source is not None else condition.device
                return torch.randn(shape, generator=source, device=device)

        def draw(number: int) -> Tensor:
            return noise(number).to(condition.device, torch.float32)

        y = self._sample_y(model, condition, sampler, self.steps(num_inference_steps), draw)
        return self._from_y(y, condition)

    def _to_y(self, clean: Tensor, condition: Tensor) -> Tensor:
        return (clean - condition) / self.residual_std if self.residual else clean

    def _from_y(self, y: Tensor, condition: Tensor) -> Tensor:
        return condition + self.residual_std * y if self.residual else y

    @abstractmethod
    def _draw_time(self, generator: torch.Generator) -> float: ...

    @abstractmethod
    def _terms(
        self, model: Model, y: Tensor, condition: Tensor, noise: Tensor, t_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Squared error (B, C, D, H, W), predicted y (B, C, D, H, W), weight (B,), meaningful (B,)."""

    @abstractmethod
    def _sample_y(self, model: Model, condition: Tensor, sampler: str, steps: int, draw: DrawNoise) -> Tensor: ...


def spread(per_sample_B: Tensor, like: Tensor) -> Tensor:
    """A number a sample, (B,), shaped to multiply tensors like ``like``, (B, ...)."""
    return per_sample_B.reshape(-1, *([1] * (like.ndim - 1)))
