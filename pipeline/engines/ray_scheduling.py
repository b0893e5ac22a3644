"""Scheduling on Ray: an actor with the short queue in front of it is a lane, and ``fill`` gives lanes items.

Which item may go where is decided here and nowhere else, from queues alone; Ray itself is reached through ``Pool``.

A worker that dies takes down the answers that it had not yet handed over. The head of its queue is therefore only
likely to be what killed it: the one behind may have. So the head is suspected, and all that stood in that queue go on
alone, one in a lane with nothing behind it, where a death has one possible cause. An innocent item is suspected at most
once, and a poison pill costs one worker more than its limit at most.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from latentcache import CtpipeError, InputError
from pipeline.engines.contract import check_nodes, node_facts
from pipeline.engines.job_log import note

log = logging.getLogger("ctpipe.engine")


STARTS = 3
"""Times a worker is started anew before its place is given up."""


T = TypeVar("T")


@dataclass
class Flight(Generic[T]):
    """An item on its way: its result's reference, how many workers it has outlived, and whether it must go alone."""

    item: T
    lost: int = 0
    alone: bool = False
    ref: Any = None


class Pool(Protocol):
    """Operations that lanes need of Ray: a new actor, an item sent to one, an answer fetched, an actor ended."""

    ray: Any

    def actor(self) -> Any: ...

    def send(self, actor: Any, item: Any) -> Any: ...


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
        said = f"node {node or 'unknown'}: one worker fewer: {error}"
        note(log, "worker_refused", logging.WARNING, said, worker_node=node, error=type(error).__name__)
        self.refused = error
        self.pool.ray.kill(self.actor)

    def send(self, flight: Flight[T]) -> None:
        if not self.queue:
            self.since = time.monotonic()
        flight.ref = self.pool.send(self.actor, flight.item)
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


@dataclass
class Waiting(Generic[T]):
    """Items that no lane has: new ones, those whose lane was taken from them, and those that must go alone."""

    source: Iterator[T]
    back: deque[Flight[T]] = field(default_factory=deque)
    alone: deque[Flight[T]] = field(default_factory=deque)

    def put(self, flight: Flight[T]) -> None:
        (self.alone if flight.alone else self.back).append(flight)

    def next(self) -> Flight[T] | None:
        """The next item that may share a lane; a new one is taken from the source only here."""
        if self.back:
            return self.back.popleft()
        return next((Flight(item) for item in self.source), None)


def fill(lanes: Sequence[Lane[T]], waiting: Waiting[T], prefetch: int) -> None:
    """Give every ready lane what it may have: ``1 + prefetch`` items, or one that goes alone.

    For each item that waits to go alone the lane with the shortest queue is set apart: it gets nothing more until it is
    empty, and then that item. The others are kept full meanwhile.
    """
    free = sorted((n for n in lanes if n.ready and not _alone(n)), key=lambda lane: len(lane.queue))
    apart, shared = free[: len(waiting.alone)], free[len(waiting.alone) :]
    for lane in apart:
        if not lane.queue:
            lane.send(waiting.alone.popleft())
    # A round each, so that few items spread over all lanes.
    for depth in range(1 + prefetch):
        for lane in shared:
            if len(lane.queue) == depth:
                if (flight := waiting.next()) is None:
                    return
                lane.send(flight)


def _alone(lane: Lane[Any]) -> bool:
    return bool(lane.queue) and lane.queue[0].alone


def _could_not_start(error: Exception) -> InputError:
    lines = str(error).splitlines() or [type(error).__name__]
    return InputError(
        f"a worker could not start: {lines[-1]}",
        expected="a worker that can load the VAE and see the store",
        remedy="Check that every node has the weights' file and reaches the store's URL.",
    )
