"""The average of the weights that is used for sampling: a power-function EMA.

Karras et al. 2023, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.1: the weight of step
s in the average at step t goes as (s/t)^gamma, so that the average spans a fixed share of the run, however long it
became. No decay constant has to be guessed for a run's length, and a run stopped early has a fitting average.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn


def gamma_of_relative_width(std: float) -> float:
    """The exponent whose profile has relative standard deviation ``std`` (equation 124, algorithm 2 there).

    The profile (s/t)^gamma on [0, 1] has variance (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).
    """
    if not 0 < std < 0.288:
        raise ValueError(f"relative width {std} of an EMA; expected more than 0 and less than 0.288")
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return float(roots.real.max())


class PowerEma:
    """Averaged copies of a module's parameters, in the parameters' own order and placement (sharded ones too)."""

    def __init__(self, module: nn.Module, std: float) -> None:
        self.gamma = gamma_of_relative_width(std)
        self.names = [name for name, _ in module.named_parameters()]
        self._live = [p for _, p in module.named_parameters()]
        self.average = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` updates (1 is the first): beta = (1 - 1/step)^(gamma + 1)."""
        beta = (1.0 - 1.0 / step) ** (self.gamma + 1.0)
        torch._foreach_lerp_(self.average, [p.detach() for p in self._live], 1.0 - beta)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from zip(self.names, self.average, strict=True)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the live weights and their average in place; a second call undoes it to the bit."""
        for live, average in zip(self._live, self.average, strict=True):
            held = live.detach().clone()
            live.copy_(average)
            average.copy_(held)
