"""Reading ahead: threads work on the next few tasks while the results come out in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(tasks: Iterable[Callable[[], T]], threads: int, ahead: int) -> Iterator[T]:
    """Run tasks in threads, at most ``ahead`` beyond the consumer, and yield their results in the tasks' order.

    Threads suffice: reading, checksums, decompression and numpy's arithmetic release the GIL. An exception comes out at
    its task's turn, never earlier. With ``threads=0`` every task runs when it is asked for. Closing the iterator
    cancels what has not begun and waits for what has.
    """
    if threads == 0:
        for task in tasks:
            yield task()
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ctpipe-read")
    pending: deque[Future[T]] = deque()
    source = iter(tasks)
    try:
        for task in source:
            pending.append(pool.submit(task))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        pool.shutdown(wait=True)
