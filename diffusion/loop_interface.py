"""What the training loop is given and gives: losses, streams, settings and the summary of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from diffusion.config import BudgetConfig, OptimiserConfig, ParallelConfig, ValidationConfig
from diffusion.stream import Batch, Step


@dataclass(frozen=True)
class Terms:
    """The loss of a batch: ``per_sample`` (B,) is what is minimised; ``parts`` name (B,) summands for the log."""

    per_sample: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """All of them by name, without their graphs."""
        return {name: values.detach() for name, values in {"loss": self.per_sample, **self.parts}.items()}


BatchLoss = Callable[[nn.Module, Batch, int], Terms]
"""(module, batch on the device, step) to terms. A batch holds at least ``weight`` (B,) and ``study_key``."""

Validate = Callable[[nn.Module, int], dict[str, float]]
"""(module with averaged weights, in evaluation mode; step) to figures. Every rank calls it; all return the same."""


class Stream(Protocol):
    """An endless sequence of steps that can be resumed; ``len`` is the steps of an epoch."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Step]: ...
    def state_dict(self) -> dict[str, int]: ...
    def load_state_dict(self, state: dict[str, int]) -> None: ...


@dataclass(frozen=True)
class LoopConfig:
    """The parts of a training configuration that the loop reads."""

    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class TrainSummary:
    """How a session of a run ended. ``stopped_by``: finished, max-steps, max-seconds, early-stopping or signal."""

    steps: int
    epochs: int
    seconds: float
    stopped_by: str
    loss: float
    best_metric: float | None
    validation: dict[str, float]
    data_wait_fraction: float
    parameters: int
