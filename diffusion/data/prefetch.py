"""Reading ahead: threads work on the next few tasks while the results come out in order.

The consumer's thread only takes what is ready. Making tasks (planning an epoch), running them and putting results back
in order all happen on the readers' threads: a trainer that waits for the interpreter's lock while another thread plans
waits 5 ms at a time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")
AHEAD_BYTES = 4 * 2**30
"""Results that wait together hold no more than this, however many may be ahead; one alone may be larger."""
LOOK_S = 0.01
"""Seconds after which a reader without room looks for it again. A reader that the consumer wakes takes the consumer's
core, or its turn at the interpreter's lock, just while a batch is wanted; one that wakes by itself does so while the
trainer computes."""


def prefetch(
    tasks: Iterable[Callable[[], T]],
    threads: int,
    ahead: int,
    *,
    size: Callable[[Any], int] = lambda task: 0,
    ahead_bytes: int = AHEAD_BYTES,
) -> Iterator[T]:
    """Run tasks in threads ahead of the consumer and yield their results in the tasks' order.

    Threads suffice: reading, checksums and arithmetic on arrays release the interpreter's lock. An exception, of a task
    or of ``tasks`` itself, comes out at its turn, never earlier. With ``threads=0`` every task runs when it is asked
    for. Closing the iterator (``close()``, or dropping it) ends the threads once they have done what they began.

    Args:
        ahead: Results, finished or in the making, that the consumer has not taken yet; at least one.
        size: Bytes that a task's result will hold.
        ahead_bytes: Bytes of all those results together.
    """
    if threads == 0:
        return (task() for task in tasks)
    return _Prefetched(_Work(iter(tasks), size, _Room(max(1, ahead), ahead_bytes)), threads)


@dataclass
class _Room:
    """Room for results that are ahead. One thread at a time waits for room, the consumer gives it back."""

    results: int
    size: int
    held: int = 0
    held_size: int = 0
    closed: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def take(self, size: int) -> bool:
        """Wait for room; False once closed."""

        def free() -> bool:
            fits = self.held < self.results and self.held_size + size <= self.size
            return self.closed or self.held == 0 or fits

        with self.changed:
            while not free():
                self.changed.wait(LOOK_S)
            self.held, self.held_size = self.held + 1, self.held_size + size
            return not self.closed

    def give(self, size: int) -> None:
        """Give room back. While half of the results are still there, nobody is woken: who waits looks by itself."""
        with self.changed:
            self.held, self.held_size = self.held - 1, self.held_size - size
            if self.held <= self.results // 2:
                self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()


@dataclass
class _Outcome(Generic[T]):
    """Outcome of a task; neither result nor error: the tasks are at an end."""

    size: int
    result: tuple[T] | None = None
    error: BaseException | None = None


class _Work(Generic[T]):
    """State that the threads share. It does not know the iterator, so that dropping that ends them."""

    def __init__(self, tasks: Iterator[Callable[[], T]], size: Callable[[Any], int], room: _Room) -> None:
        self.room = room
        self.ready: SimpleQueue[_Outcome[T]] = SimpleQueue()
        self._tasks, self._size = tasks, size
        self._turn, self._order = threading.Lock(), threading.Lock()
        self._drawn, self._put = 0, 0
        self._finished: dict[int, _Outcome[T]] = {}
        self._ended = False

    def run(self) -> None:
        """A reader's life. Between tasks it holds on to nothing: a result may be memory that is used again."""
        while self._run_next():
            pass

    def _run_next(self) -> bool:
        drawn = self._draw()
        if drawn is None:
            return False
        number, task, outcome = drawn
        if task is not None:
            try:
                outcome.result = (task(),)
            except BaseException as error:  # noqa: BLE001 - raised again at its turn, on the consumer's thread
                outcome.error = error
        self._hand_over(number, outcome)
        return True

    def _draw(self) -> tuple[int, Callable[[], T] | None, _Outcome[T]] | None:
        """The next task once there is room for its result: in turn, so that room goes to the one needed first."""
        with self._turn:
            if self._ended or self.room.closed:
                return None
            task, outcome = None, _Outcome[T](0)
            try:
                task = next(self._tasks, None)
                outcome.size = 0 if task is None else self._size(task)
            except BaseException as error:  # noqa: BLE001 - raised again at its turn, on the consumer's thread
                task, outcome.error = None, error
            self._ended = task is None
            if not self.room.take(outcome.size):
                return None
            number, self._drawn = self._drawn, self._drawn + 1
            return number, task, outcome

    def _hand_over(self, number: int, outcome: _Outcome[T]) -> None:
        with self._order:
            self._finished[number] = outcome
            while self._put in self._finished:
                self.ready.put(self._finished.pop(self._put))
                self._put += 1


class _Prefetched(Iterator[T]):
    def __init__(self, work: _Work[T], threads: int) -> None:
        self._work = work
        # Daemons, ended by the finalizer: a forgotten iterator must not keep the interpreter from ending.
        readers = [threading.Thread(target=work.run, name=f"ctpipe-read-{n}", daemon=True) for n in range(threads)]
        self._close = weakref.finalize(self, _end, work.room, readers)
        for reader in readers:
            reader.start()

    def __next__(self) -> T:
        if not self._close.alive:
            raise StopIteration
        outcome = self._work.ready.get()
        if outcome.result is None:
            self.close()
            if outcome.error is None:
                raise StopIteration
            raise outcome.error
        self._work.room.give(outcome.size)
        return outcome.result[0]

    def close(self) -> None:
        """End the threads; what they have begun is finished first."""
        self._close()


def _end(room: _Room, readers: list[threading.Thread]) -> None:
    room.close()
    for reader in readers:
        if reader is not threading.current_thread():
            reader.join()
