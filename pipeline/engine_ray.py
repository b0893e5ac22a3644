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
from pipeline.ray_cluster import connect

log = logging.getLogger("ctpipe.engine")

STARTS = 3
"""Times a worker is started anew before its place is given up."""

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
        self.problem: CtpipeError | None = None
        try:
            self.state = stage.setup(device)
        except CtpipeError as error:  # told by ``facts``: Ray would hand it over as text
            self.problem = error

    def facts(self) -> tuple[str, dict[str, str], CtpipeError | None]:
        import ray

        return ray.util.get_node_ip_address(), node_facts(), self.problem

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
    """One actor and the short queue in front of it. The head's clock starts when it becomes the head.

    A lane gets work only once its actor has answered: an actor that waits for a node holds nothing back. ``starting``
    is the reference of that answer while it is due; ``refused`` says why the lane was given up.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.queue: deque[Flight[T]] = deque()
        self.refused: CtpipeError | None = None
        self.starts = 0
        self._hire()

    def _hire(self) -> None:
        self.actor = self.pool.actor()
        self.starting: Any = self.actor.facts.remote()
        self.starts += 1
        self.since = time.monotonic()

    @property
    def ready(self) -> bool:
        return self.starting is None and self.refused is None

    def admit(self) -> None:
        """Take the answer of a starting actor: the lane is ready, tried again, or given up."""
        exceptions = self.pool.ray.exceptions
        try:
            node, facts, problem = self.pool.ray.get(self.starting)
        except exceptions.RayError as error:
            if self.starts < STARTS and isinstance(error, exceptions.RayActorError):
                log.warning("a worker died while it started (%s); starting another", type(error).__name__)
                return self._hire()
            node, facts, problem = "", node_facts(), _could_not_start(error)
        self.starting, self.starts = None, 0
        try:
            check_nodes({node: facts})
            if problem is not None:
                raise problem
        except CtpipeError as error:
            self._give_up(error, node)

    def _give_up(self, error: CtpipeError, node: str) -> None:
        log.warning("node %s: one worker fewer: %s", node or "unknown", error)
        self.refused = error
        self.pool.ray.kill(self.actor)

    def takes(self, flight: Flight[T]) -> bool:
        """Whether the lane may have this item now. What has lost a worker runs alone, and nothing queues behind it.

        A worker that dies takes down answers it had not yet handed over, so the item before a poisonous one is blamed
        with it. Run alone, an innocent item is blamed once at most, and a poisonous one blames nobody else again.
        """
        if flight.lost:
            return not self.queue
        return len(self.queue) < 1 + self.pool.options.prefetch and not (self.queue and self.queue[0].lost)

    def send(self, flight: Flight[T]) -> None:
        if not self.queue:
            self.since = time.monotonic()
        prepared = self.pool.prepare.remote(self.pool.stage_ref, flight.item, self.pool.options.attempts)
        flight.ref = self.actor.run.remote(prepared)
        self.queue.append(flight)

    def pop(self) -> Flight[T]:
        self.since = time.monotonic()
        return self.queue.popleft()

    def restart(self) -> list[Flight[T]]:
        """Replace the actor; returns what stood in its queue."""
        waiting, self.queue = list(self.queue), deque()
        self.pool.ray.kill(self.actor)
        self._hire()
        return waiting


class Pool:
    """What all lanes share: Ray, the stage in the object store, and how to make an actor."""

    def __init__(self, ray: Any, stage: Stage[Any, Any, Any, Any], options: EngineOptions) -> None:
        self.ray, self.options = ray, options
        self.stage_ref = ray.put(stage)
        self.prepare = ray.remote(num_cpus=0.5, max_retries=options.losses)(_prepare)
        gpus = options.gpus_per_worker if options.wants_gpu else 0
        # Actors are spread, so that the loss of a node costs as few of them as can be.
        self._host = ray.remote(num_cpus=0.5, num_gpus=gpus, scheduling_strategy="SPREAD")(Host)

    def actor(self) -> Any:
        device = "cuda" if self.options.wants_gpu else "cpu"
        return self._host.remote(self.stage_ref, device, self.options.attempts)


def ray_stream(items: Iterable[T], stage: Stage[T, P, S, R], options: EngineOptions) -> Iterator[Outcome[T, R]]:
    """Run a stage on Ray. An item that outlives ``losses`` workers, or outlasts the time-out, is set aside.

    A worker that cannot start (it does not see the store, has no CUDA, runs another version) is named in a warning and
    the others do its work; when none is left, its reason is raised.

    Raises:
        InputError: Ray is not installed or not there, too few GPUs, or no worker can start.
    """
    ray = connect(options)
    pool = Pool(ray, stage, options)
    lanes: list[Lane[T]] = [Lane(pool) for _ in options.devices]
    try:
        yield from _drive(ray, lanes, iter(items), options)
    finally:
        for lane in lanes:
            ray.kill(lane.actor)


_END: Any = object()


def _drive(ray: Any, lanes: list[Lane[T]], source: Iterator[T], options: EngineOptions) -> Iterator[Outcome[T, Any]]:
    again: deque[Flight[T]] = deque()
    begun = False

    while True:
        for lane in lanes:
            while lane.ready:
                if not again and (item := next(source, _END)) is not _END:
                    again.append(Flight(item))
                if not again or not lane.takes(again[0]):
                    break
                lane.send(again.popleft())
        begun = begun or any(lane.ready for lane in lanes)
        heads = {lane.queue[0].ref: lane for lane in lanes if lane.queue}
        starting = {lane.starting: lane for lane in lanes if lane.starting is not None}
        if not heads:
            if any(lane.ready for lane in lanes):
                return  # workers are ready and nothing is left for them
            if not starting:
                raise next(lane.refused for lane in lanes if lane.refused is not None)
            _check_patience(lanes, options, begun)
        done, _ = ray.wait([*heads, *starting], num_returns=1, timeout=1.0)
        for ref in done:
            if ref in starting:
                starting[ref].admit()
            elif (outcome := _land(ray, heads[ref], again, options)) is not None:
                yield outcome
        for lane in lanes:
            if (overdue := _overdue(lane, again, options)) is not None:
                yield overdue


def _land(ray: Any, lane: Lane[T], again: deque[Flight[T]], options: EngineOptions) -> Outcome[T, Any] | None:
    """Take the head's outcome. If its worker died, put the queue back; the head alone pays for it."""
    head = lane.queue[0]
    try:
        outcome: Outcome[T, Any] = ray.get(head.ref)
    except ray.exceptions.RayError as error:
        head.lost += 1
        log.warning("a worker was lost (%s); its work is sent to another", type(error).__name__)
        if isinstance(error, ray.exceptions.RayActorError):
            _, *others = lane.restart()
            again.extend(others)
        else:  # the task that prepared it died; the actor and the rest of its queue live
            lane.pop()
        if head.lost >= options.losses:
            reason = f"{head.lost} workers died on it ({type(error).__name__}), most likely out of memory"
            return Outcome(head.item, error=reason, error_kind="WorkerDied", attempts=head.lost)
        again.append(head)
        return None
    lane.pop()
    return outcome


def _overdue(lane: Lane[T], again: deque[Flight[T]], options: EngineOptions) -> Outcome[T, Any] | None:
    if options.timeout_s is None or not lane.queue or time.monotonic() - lane.since < options.timeout_s:
        return None
    head, *others = lane.restart()
    again.extend(others)
    reason = f"took longer than {options.timeout_s:.0f} s"
    return Outcome(head.item, error=reason, error_kind="Timeout", attempts=head.lost + 1)


def _check_patience(lanes: list[Lane[Any]], options: EngineOptions, begun: bool) -> None:
    """Raises InputError when no worker has become ready for too long."""
    waited = time.monotonic() - max(lane.since for lane in lanes if lane.starting is not None)
    if waited > options.start_timeout_s:
        raise InputError(
            f"no Ray worker {'is left' if begun else 'could be placed'} after {waited:.0f} s of waiting",
            expected="a node with free CPUs" + (" and GPUs" if options.wants_gpu else ""),
            remedy="Look at `ray status`; add nodes, or give fewer --gpus. Run the same command again to resume.",
        )


def _could_not_start(error: Exception) -> InputError:
    lines = str(error).splitlines() or [type(error).__name__]
    return InputError(
        f"a worker could not start: {lines[-1]}",
        expected="a worker that can load the VAE and see the store",
        remedy="Check that every node has the weights' file and reaches the store's URL.",
    )
