from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from diffusion.prefetch import prefetch


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_keep_the_tasks_order(threads: int) -> None:
    def slow_for_even(i: int) -> int:
        time.sleep(0.002 if i % 2 == 0 else 0)
        return i

    tasks = [partial(slow_for_even, i) for i in range(20)]
    assert list(prefetch(tasks, threads, ahead=3)) == list(range(20))


def test_reading_ahead_is_bounded() -> None:
    started: list[int] = []

    def tasks() -> Iterator[Callable[[], int]]:
        for i in range(1000):
            started.append(i)
            yield partial(int, i)

    reader = prefetch(tasks(), threads=2, ahead=3)
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(started) <= 5 + 3 + 1
    reader.close()  # type: ignore[attr-defined]


def test_an_error_comes_at_its_turn_and_threads_end() -> None:
    def fail() -> int:
        raise ValueError("broken latent")

    tasks: list[Callable[[], int]] = [partial(int, 0), partial(int, 1), fail, partial(int, 3)]
    reader = prefetch(tasks, threads=2, ahead=4)
    assert [next(reader), next(reader)] == [0, 1]
    with pytest.raises(ValueError, match="broken latent"):
        next(reader)
    assert not [t for t in threading.enumerate() if t.name.startswith("ctpipe-read")]
