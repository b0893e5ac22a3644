"""Engines of one process: inline, and the embedded dask pipeline with bounded read-ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from latentcache import missing_extra
from pipeline.engines.contract import EngineOptions, Outcome, P, R, S, Stage, T, attempt, chain


def _inline(items: Iterable[T], stage: Stage[T, P, S, R], options: EngineOptions) -> Iterator[Outcome[T, R]]:
    state = stage.setup(options.devices[0])
    for item in items:
        yield attempt(item, options.attempts, chain(item, stage, lambda work: work(state)))


def _dask_scheduler() -> Callable[..., Any]:
    """Return dask's threaded scheduler.

    Raises:
        InputError: dask is not installed; names the extra.
    """
    try:
        from dask.threaded import get
    except ModuleNotFoundError as error:
        raise missing_extra("dask", "dask", "--engine dask; --engine inline needs nothing") from error
    scheduler: Callable[..., Any] = get
    return scheduler


def _embedded_dask(items: Iterable[T], stage: Stage[T, P, S, R], options: EngineOptions) -> Iterator[Outcome[T, R]]:
    """Threads of dask's local scheduler: each carries one item from prepare to run, and waits there for a device.

    A thread beyond the number of devices prepares its item while the devices are busy, so that at most
    ``devices * (1 + prefetch)`` prepared items exist. The graph is one task per thread, which takes items until none is
    left: nothing grows with their number, and no thread waits for the slowest of a window.
    """
    get = _dask_scheduler()
    states: queue.SimpleQueue[S] = queue.SimpleQueue()
    for device in options.devices:
        states.put(stage.setup(device))

    def on_device(work: Callable[[S], R]) -> R:
        state = states.get()
        try:
            return work(state)
        finally:
            states.put(state)

    threads = len(options.devices) * (1 + options.prefetch)
    # Bounded, so that a consumer that is slower than the devices slows them down.
    done: queue.Queue[Outcome[T, R] | BaseException | None] = queue.Queue(maxsize=4 * threads)
    stopping = threading.Event()
    taking = threading.Lock()
    source = iter(items)

    def hand_over(outcome: Outcome[T, R] | BaseException | None) -> None:
        while True:
            try:
                return done.put(outcome, timeout=0.5)
            except queue.Full:
                if stopping.is_set():
                    return

    def carry() -> None:
        try:
            while not stopping.is_set():
                with taking:
                    item = next(source, _END)
                if isinstance(item, _End):
                    return
                hand_over(attempt(item, options.attempts, chain(item, stage, on_device)))
        except BaseException:
            stopping.set()
            raise

    def drive() -> None:
        graph = {("carry", n): (carry,) for n in range(threads)}
        try:
            get(graph, list(graph), num_workers=threads)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            hand_over(error)
        hand_over(None)

    driver = threading.Thread(target=drive, name="ctpipe-dask", daemon=True)
    driver.start()
    try:
        while (outcome := done.get()) is not None:
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        stopping.set()
        driver.join()


class _End:
    """Marks that the items are used up; an item may be None."""


_END = _End()
