"""The engine on a dask cluster: each worker process keeps one state, and reads the next item while it computes."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from latentcache import InputError, missing_extra
from pipeline.engines.contract import EngineOptions, Outcome, Stage, attempt, chain, check_nodes, node_facts
from pipeline.engines.job_log import active, start

T = TypeVar("T")
P = TypeVar("P")
S = TypeVar("S")
R = TypeVar("R")


_states: dict[str, tuple[threading.Lock, Any]] = {}
_making = threading.Lock()


def _carry(
    item: T, stage: Stage[T, P, S, R], device: str, attempts: int, token: str, json_lines: bool
) -> Outcome[T, R]:
    """On a worker: one item from prepare to run; other threads of the worker prepare meanwhile."""
    if json_lines:
        start()
    with _making:
        if token not in _states:
            _states.clear()
            _states[token] = (threading.Lock(), stage.setup(device))
        lock, state = _states[token]

    def on_device(work: Callable[[S], R]) -> R:
        with lock:
            return work(state)

    return attempt(item, attempts, chain(item, stage, on_device))


def cluster_stream(items: Iterable[T], stage: Stage[T, P, S, R], options: EngineOptions) -> Iterator[Outcome[T, R]]:
    """Run a stage on the workers of ``options.scheduler``.

    A worker that dies takes its item to another one; an item that too many died on is excluded. How many that is, is
    the scheduler's own setting (``distributed.scheduler.allowed-failures``).

    Raises:
        InputError: The scheduler cannot be reached, has no workers, or a node runs another version.
    """
    try:
        from distributed import Client, Future, KilledWorker, as_completed
    except ModuleNotFoundError as error:
        raise missing_extra("distributed", "dask", "--dask-scheduler") from error

    try:
        client = Client(options.scheduler, set_as_default=False, timeout="20s")
    except (OSError, TimeoutError) as error:
        raise InputError(
            "the dask scheduler does not answer",
            expected="a scheduler at --dask-scheduler",
            remedy="Start it first.",
        ) from error
    with client:
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            raise InputError("a dask cluster without workers", expected="at least one", remedy="Start dask workers.")
        check_nodes(client.run(node_facts))
        device = "cuda" if options.wants_gpu else "cpu"
        token = uuid.uuid4().hex
        source = iter(items)
        asked: dict[Future, T] = {}

        def submit(item: T) -> Future:
            future = client.submit(_carry, item, stage, device, options.attempts, token, active(), pure=False)
            asked[future] = item
            return future

        running = as_completed(loop=client.loop)
        for item in itertools.islice(source, len(workers) * (1 + options.prefetch)):
            running.add(submit(item))
        for future in running:
            item = asked.pop(future)
            yield _result(item, future, KilledWorker)
            for following in itertools.islice(source, 1):
                running.add(submit(following))


def _result(item: T, future: Any, killed: type[Exception]) -> Outcome[T, Any]:
    """The outcome that a worker returned, or the one for an item that no worker survived."""
    try:
        outcome: Outcome[T, Any] = future.result()
        return outcome
    except killed as error:
        died = int(getattr(error, "allowed_failures", 0)) + 1
        reason = f"{died} workers died on it, most likely out of memory; give workers more memory"
        return Outcome(item, error=reason, error_kind="WorkerDied", attempts=died)
