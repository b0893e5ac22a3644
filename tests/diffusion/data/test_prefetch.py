from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from diffusion.data import prefetch


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("ctpipe-read")]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_keep_the_tasks_order(threads: int) -> None:
    def slow_for_even(i: int) -> int:
        time.sleep(0.002 if i % 2 == 0 else 0)
        return i

    tasks = [partial(slow_for_even, i) for i in range(20)]
    assert list(prefetch(tasks, threads, ahead=3)) == list(range(20))
    assert not readers()


def test_reading_ahead_is_bounded() -> None:
    started: list[int] = []

    def tasks() -> Iterator[Callable[[], int]]:
        for i in range(1000):
            started.append(i)
            yield partial(int, i)

    reader = prefetch(tasks(), threads=2, ahead=3)
    assert [next(reader) for _ in range(5)] == [0, 1, 2, 3, 4]
    reached(lambda: len(started), 6)
    # Eight may be begun; a task's size is known only once it is drawn, so one more is.
    assert 5 < len(started) <= 5 + 3 + 1
    reader.close()  # type: ignore[attr-defined]


def reached(count: Callable[[], int], wanted: int) -> int:
    """A count once it has come to what is wanted, however busy the machine, and had a moment to go beyond."""
    until = time.monotonic() + 300  # a bound against hanging
    while count() < wanted and time.monotonic() < until:
        time.sleep(0.005)
    time.sleep(0.03)
    return count()


def test_results_that_wait_hold_no_more_bytes_than_allowed() -> None:
    done: list[int] = []
    sizes = [40, 40, 40, 250, 40]  # the fourth is larger than the limit: it goes alone

    def task(i: int) -> int:
        done.append(i)
        return i

    reader = prefetch([partial(task, i) for i in range(5)], 3, 10, size=lambda t: sizes[t.args[0]], ahead_bytes=100)
    for expected, begun in enumerate([2, 3, 3, 4, 5]):
        assert reached(lambda: len(done), begun) == begun
        assert next(reader) == expected
    assert list(reader) == []


def test_tasks_are_made_off_the_consumers_thread() -> None:
    makers = set()

    def tasks() -> Iterator[Callable[[], int]]:
        for i in range(20):
            makers.add(threading.current_thread())
            yield partial(int, i)

    assert len(list(prefetch(tasks(), 2, 2))) == 20
    assert threading.current_thread() not in makers


def test_an_error_comes_at_its_turn_and_threads_end() -> None:
    def fail() -> int:
        raise ValueError("broken latent")

    tasks: list[Callable[[], int]] = [partial(int, 0), partial(int, 1), fail, partial(int, 3)]
    reader = prefetch(tasks, threads=2, ahead=4)
    assert [next(reader), next(reader)] == [0, 1]
    with pytest.raises(ValueError, match="broken latent"):
        next(reader)
    assert not readers()
    assert list(reader) == []


def test_an_error_in_making_tasks_comes_at_its_turn() -> None:
    def tasks() -> Iterator[Callable[[], int]]:
        yield partial(int, 0)
        raise ValueError("no plan")

    reader = prefetch(tasks(), threads=2, ahead=4)
    assert next(reader) == 0
    with pytest.raises(ValueError, match="no plan"):
        next(reader)


def test_threads_end_when_the_iterator_is_dropped() -> None:
    reader = prefetch((partial(int, i) for i in range(1000)), threads=3, ahead=2)
    assert next(reader) == 0
    assert len(readers()) == 3
    del reader
    gc.collect()
    assert not readers()


def test_a_reader_at_rest_holds_no_result() -> None:
    class Result:
        pass

    reader = prefetch((Result for _ in range(1000)), threads=2, ahead=2)
    results = [next(reader) for _ in range(6)]
    alive = [weakref.ref(result) for result in results]
    results.clear()
    gc.collect()
    assert not [ref for ref in alive if ref()]
    reader.close()  # type: ignore[attr-defined]


def test_a_forgotten_iterator_lets_the_program_end() -> None:
    script = (
        "import itertools; from functools import partial; from diffusion.data import prefetch\n"
        "reader = prefetch(map(lambda i: partial(int, i), itertools.count()), 2, 2); print(next(reader), next(reader))"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True)
    assert (found.stdout, found.stderr) == ("0 1\n", "")
