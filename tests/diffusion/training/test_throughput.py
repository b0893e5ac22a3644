from __future__ import annotations

import time

import pytest
import torch

from diffusion.training import measured_matmul_rate, throughput as progress
from diffusion.training.throughput import Meter


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def test_waiting_is_told_from_computing(clock: Clock) -> None:
    meter = Meter(torch.device("cpu"), flops_per_sample=1e9, matmul_rate=1e11)

    def reading() -> object:
        for item in range(2):
            clock.now += 0.1
            yield item

    for _ in range(3):
        meter.begin_step()
        for _ in meter.waiting(reading()):  # type: ignore[var-annotated,arg-type]
            clock.now += 0.4
        meter.end_step(samples=8)
        clock.now += 100  # validation between steps counts for neither
    now = meter.progress(step=3, total_steps=13, epoch=0, loss=1.0, learning_rate=0.1, world=2)
    assert now.step_s == pytest.approx(1.0)
    assert now.data_wait_fraction == pytest.approx(0.2)
    assert now.samples_per_s == pytest.approx(8)
    assert now.seconds_left == pytest.approx(10)
    assert now.mfu == pytest.approx(3 * 1e9 * 4 / 1e11), "each of two ranks computes four samples a second"
    assert meter.data_wait_fraction == pytest.approx(0.2)
    assert now.memory_gib > 0.01


def test_the_matmul_rate_is_a_rate() -> None:
    begin = time.perf_counter()
    rate = measured_matmul_rate(torch.device("cpu"), torch.float32)
    assert rate >= 2 * 512**3 / (time.perf_counter() - begin), "the best of several is at least the mean"
