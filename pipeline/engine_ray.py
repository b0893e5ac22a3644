"""The engine on Ray: CPU tasks prepare, actors that hold the state run, the driver keeps every queue short.

Ray's core API is used rather than Ray Data: an item needs a fate of its own (a limit of attempts, a time-out, a dead
node) and Ray Data gives a fate to blocks and jobs. See infra/decisions/0002-engine.md.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from latentcache.errors import CtpipeError, InputError
from pipeline.engine import EngineOptions, Outcome, Stage, attempt, timed
from pipeline.engine_dask import check_nodes, node_facts

log = logging.getLogger("ctpipe.engine")

T = TypeVar("T")
P = TypeVar("P")
S = TypeVar("S")
R = TypeVar("R")


@dataclass
class Flight(Generic[T]):
    """An item on its way: its result's reference, and how many workers it has outlived."""

    item: T
    lost: int = 0
    ref: Any = None


class Host:
    """What an actor holds: one state on one device. ``run`` takes the outcome of preparing."""

    def __init__(self, stage: Stage[Any, Any, Any, Any], device: str, attempts: int) -> None:
        self.stage, self.attempts = stage, attempts
        self.state = stage.setup(device)

    def facts(self) -> dict[str, str]:
        return node_facts()

    def run(self, prepared: Outcome[Any, Any]) -> Outcome[Any, Any]:
        if prepared.error is not None:
            return prepared
        outcome = attempt(
            prepared.item, self.attempts, lambda s: timed(s, "run", lambda: self.stage.run(self.state, prepared.value))
        )
        outcome.seconds.update(prepared.seconds)
        return outcome


def _prepare(stage: Stage[Any, Any, Any, Any], item: Any, attempts: int) -> Outcome[Any, Any]:
    return attempt(item, attempts, lambda s: timed(s, "prepare", lambda: stage.prepare(item)))


class Lane(Generic[T]):
    """One actor and the short queue in front of it. The head's clock starts when it becomes the head."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.queue: deque[Flight[T]] = deque()
        self.actor = pool.actor()
        self.since = time.monotonic()

    def send(self, flight: Flight[T]) -> None:
        if not self.queue:
            self.since = time.monotonic()
        prepared = self.pool.prepare.remote(self.pool.stage_ref, flight.item, self.pool.options.attempts)
        flight.ref = self.actor.run.remote(prepared)
        self.queue.append(flight)

    def restart(self) -> list[Flight[T]]:
        """Replace the actor; returns what stood in its queue."""
        waiting, self.queue = list(self.queue), deque()
        self.pool.ray.kill(self.actor)
        self.actor = self.pool.actor()
        return waiting


class Pool:
    """What all lanes share: Ray, the stage in the object store, and how to make an actor."""

    def __init__(self, ray: Any, stage: Stage[Any, Any, Any, Any], options: EngineOptions) -> None:
        self.ray, self.options = ray, options
        self.stage_ref = ray.put(stage)
        self.prepare = ray.remote(num_cpus=0.5, max_retries=options.attempts)(_prepare)
        gpus = options.gpus_per_worker if options.wants_gpu else 0
        self._host = ray.remote(num_cpus=0.5, num_gpus=gpus)(Host)

    def actor(self) -> Any:
        device = "cuda" if self.options.wants_gpu else "cpu"
        return self._host.remote(self.stage_ref, device, self.options.attempts)


def ray_stream(items: Iterable[T], stage: Stage[T, P, S, R], options: EngineOptions) -> Iterator[Outcome[T, R]]:
    """Run a stage on Ray. An item that kills ``attempts`` workers, or outlasts the time-out, is set aside.

    Raises:
        InputError: Ray is not installed or not there, too few GPUs, or a node runs another version.
    """
    ray = _connect(options)
    pool = Pool(ray, stage, options)
    lanes: list[Lane[T]] = [Lane(pool) for _ in options.devices]
    _check_actors(ray, lanes)
    source = iter(items)
    again: deque[Flight[T]] = deque()

    def take() -> Flight[T] | None:
        if again:
            return again.popleft()
        return next((Flight(item) for item in source), None)

    while True:
        for lane in lanes:
            while len(lane.queue) < 1 + options.prefetch and (flight := take()) is not None:
                lane.send(flight)
        heads = {lane.queue[0].ref: lane for lane in lanes if lane.queue}
        if not heads:
            return
        done, _ = ray.wait(list(heads), num_returns=1, timeout=1.0)
        for ref in done:
            outcome = _land(ray, heads[ref], again, options)
            if outcome is not None:
                yield outcome
        for lane in lanes:
            overdue = _overdue(lane, again, options)
            if overdue is not None:
                yield overdue


def _land(ray: Any, lane: Lane[T], again: deque[Flight[T]], options: EngineOptions) -> Outcome[T, Any] | None:
    """Take the head's outcome. If its worker died, put the queue back; the head alone pays with an attempt."""
    head = lane.queue[0]
    try:
        outcome: Outcome[T, Any] = ray.get(head.ref)
    except ray.exceptions.RayError as error:
        head.lost += 1
        log.warning("a worker was lost (%s); its work is sent to another", type(error).__name__)
        waiting = lane.restart()
        if head.lost >= options.attempts:
            waiting.remove(head)
            again.extend(waiting)
            reason = f"{head.lost} workers died on it ({type(error).__name__}), most likely out of memory"
            return Outcome(head.item, error=reason, error_kind="WorkerDied", attempts=head.lost)
        again.extend(waiting)
        return None
    lane.queue.popleft()
    lane.since = time.monotonic()
    return outcome


def _overdue(lane: Lane[T], again: deque[Flight[T]], options: EngineOptions) -> Outcome[T, Any] | None:
    if options.timeout_s is None or not lane.queue or time.monotonic() - lane.since < options.timeout_s:
        return None
    head, *others = lane.restart()
    again.extend(others)
    reason = f"took longer than {options.timeout_s:.0f} s"
    return Outcome(head.item, error=reason, error_kind="Timeout", attempts=head.lost + 1)


def _connect(options: EngineOptions) -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "Ray is not installed",
            expected="the extra `ray`",
            remedy="pip install 'ctpipe[ray]', or use --engine dask.",
        ) from error
    if not ray.is_initialized():
        local = options.ray_address in (None, "local")
        settings: dict[str, Any] = {"num_cpus": max(2, len(options.devices) + 1)} if local else {}
        try:
            ray.init(
                address="local" if local else options.ray_address,
                include_dashboard=False if local else None,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **settings,
            )
        except ConnectionError as error:
            raise InputError(
                "no Ray cluster answers at that address",
                expected="a running head node",
                remedy="Start one: ray start --head.",
            ) from error
    found = float(ray.cluster_resources().get("GPU", 0))
    wanted = len(options.devices) * options.gpus_per_worker
    if options.wants_gpu and found < wanted:
        raise InputError(
            f"a Ray cluster with {found:g} GPUs",
            expected=f"at least {wanted:g}",
            remedy="Give fewer --gpus, or --gpus 0 to encode on CPUs, or wait until GPU nodes have joined.",
        )
    return ray


def _check_actors(ray: Any, lanes: list[Lane[Any]]) -> None:
    """Wait for the first actors, so that a state that cannot be made ends the run before any work is sent."""
    for number, lane in enumerate(lanes):
        try:
            check_nodes({f"worker {number}": ray.get(lane.actor.facts.remote())})
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, CtpipeError):
                raise cause from error
            raise InputError(
                f"worker {number} could not start: {str(error).splitlines()[-1]}",
                expected="a worker that can load the VAE and see the store",
                remedy="Check that every node has the weights' file and reaches the store's URL.",
            ) from error
