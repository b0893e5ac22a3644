"""Time of a training loop by what it is spent on: throughput, waiting for data, memory, MFU and the time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


WINDOW = 50
"""Steps that rates are averaged over."""


@dataclass(frozen=True)
class Progress:
    """State of a run after a step.

    ``mfu`` is the share of the measured matmul rate that model arithmetic reached (Chowdhery et al. 2022, appendix B),
    none where the model's arithmetic is unknown.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    learning_rate: float
    step_s: float
    samples_per_s: float
    data_wait_fraction: float
    memory_gib: float
    mfu: float | None
    seconds_left: float


class Meter:
    """Clocks steps and the waits inside them.

    Args:
        flops_per_sample: Forward arithmetic of one sample, on this rank; the backward pass counts twice that.
        matmul_rate: Measured floating point operations a second of this device; none leaves MFU out.
    """

    def __init__(self, device: torch.device, flops_per_sample: float | None, matmul_rate: float | None) -> None:
        self.device = device
        self.flops_per_sample, self.matmul_rate = flops_per_sample, matmul_rate
        self._steps: deque[tuple[float, float, int]] = deque(maxlen=WINDOW)
        self._wait = self._total = self._total_wait = 0.0
        self._begin = self.started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds since this session began."""
        return time.perf_counter() - self.started

    def waiting(self, items: Iterable[T]) -> Iterator[T]:
        """The same items; the time until each arrives counts as waiting for data."""
        iterator = iter(items)
        while True:
            begin = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._wait += time.perf_counter() - begin
            yield item

    def begin_step(self) -> None:
        """Leave out what came before: validation, a checkpoint."""
        self._begin, self._wait = time.perf_counter(), 0.0

    def end_step(self, samples: int) -> None:
        """A step is over; ``samples`` were seen by all ranks together."""
        seconds = time.perf_counter() - self._begin
        self._steps.append((seconds, self._wait, samples))
        self._total += seconds
        self._total_wait += self._wait

    @property
    def data_wait_fraction(self) -> float:
        """Share of the whole session's step time that was spent waiting for data."""
        return self._total_wait / self._total if self._total else 0.0

    def progress(
        self, *, step: int, total_steps: int, epoch: int, loss: float, learning_rate: float, world: int
    ) -> Progress:
        seconds = sum(s for s, _, _ in self._steps)
        samples = sum(n for _, _, n in self._steps)
        step_s = seconds / len(self._steps)
        mfu = None
        if self.flops_per_sample and self.matmul_rate:
            mfu = 3 * self.flops_per_sample * samples / world / seconds / self.matmul_rate
        return Progress(
            step=step,
            total_steps=total_steps,
            epoch=epoch,
            loss=loss,
            learning_rate=learning_rate,
            step_s=step_s,
            samples_per_s=samples / seconds,
            data_wait_fraction=sum(w for _, w, _ in self._steps) / seconds,
            memory_gib=self.memory_bytes() / 2**30,
            mfu=mfu,
            seconds_left=step_s * max(0, total_steps - step),
        )

    def memory_bytes(self) -> int:
        """Peak device memory on a GPU, the process's resident memory on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import psutil  # here, so that measuring a device needs torch alone (infra/bench/gpu.py)

        return int(psutil.Process().memory_info().rss)


def measured_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large square matrix product on this device, best of five."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        _synchronise(device)
        begin = time.perf_counter()
        torch.mm(a, b)
        _synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * n**3 / best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
