"""Interruptions of a run, reported so that a person can act: values that are not finite, and signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latentcache import NonFiniteError


def non_finite(
    step: int, losses: Iterable[tuple[Sequence[str], Mapping[str, Tensor]]], module: nn.Module
) -> NonFiniteError:
    """The error for a step whose loss or gradient is NaN or infinite. The weights are still those of the step before.

    Args:
        losses: For every batch, its study keys and the (B,) tensors that were summed into the loss.
    """
    batches = list(losses)
    for keys, tensors in batches:
        for name, values in tensors.items():
            bad = [key for key, finite in zip(keys, torch.isfinite(values).tolist(), strict=True) if not finite]
            if bad:
                return _error(step, f"{name} of study {', '.join(bad)}")
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            studies = sorted({key for keys, _ in batches for key in keys})
            return _error(step, f"the gradient of {name}, from studies {', '.join(studies)},")
    return _error(step, "a loss on another rank, which names it,")


def _error(step: int, what: str) -> NonFiniteError:
    return NonFiniteError(
        f"step {step}: {what} is NaN or infinite",
        expected="finite losses and gradients",
        remedy="The last checkpoint is untouched. Run `ctpipe verify STORE`; if it is clean, lower "
        "optimiser.learning_rate or set optimiser.precision=fp32, and resume.",
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT instead of dying of them; a second one of a kind acts as usual.

    Outside the main thread (a Ray worker) Python takes no handlers; the launcher's own stop applies there.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous: dict[int, Any] = {}

    def remember(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, remember)
    try:
        yield received
    finally:
        for known, handler in previous.items():
            signal.signal(known, handler)
