"""Which item goes to which lane when workers die: the real lanes and driver over a stand-in of Ray that is no clock.

The stand-in runs actors one item at a time in an order that the test gives. As Ray does, it hands answers over late, so
that a worker that dies takes finished answers with it.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, strategies as st

from latentcache import InputError
from pipeline.engines import EngineOptions, Outcome
from pipeline.engines.contract import node_facts
from pipeline.engines.ray_cluster import drive
from pipeline.engines.ray_scheduling import Lane, Waiting, fill


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class Exceptions:
    RayError, RayActorError = RayError, RayActorError


@dataclass(eq=False)
class Ref:
    """An answer that is due, there, or lost with what made it."""

    value: Any = None
    done: bool = False
    lost: type[RayError] | None = None


@dataclass(eq=False)
class Actor:
    """Runs its queue in order; hands over an answer when ``lag`` newer ones are there, or when it has nothing to do."""

    ray: Ray
    alive: bool = True
    queue: deque[tuple[Ref, int]] = field(default_factory=deque)
    finished: deque[tuple[Ref, int]] = field(default_factory=deque)

    @property
    def facts(self) -> Actor:
        return self

    def remote(self) -> Ref:
        number = self.ray.actors.index(self)
        return Ref((f"n{number}", self.ray.facts.get(number, node_facts()), self.ray.problem), done=True)

    def step(self) -> None:
        """Run one item, or die of it."""
        ref, item = self.queue[0]
        if self.ray.dies(item):
            self.die()
            return
        self.queue.popleft()
        if item in self.ray.unreadable:  # what prepared it died, elsewhere
            ref.lost = RayError
            return
        self.finished.append((ref, item))
        while len(self.finished) > (self.ray.lag if self.queue else 0):
            answered, of = self.finished.popleft()
            answered.value, answered.done = Outcome(of, of * of), True

    def die(self) -> None:
        self.alive = False
        for ref, _ in (*self.finished, *self.queue):
            ref.lost = RayActorError
        self.finished.clear()
        self.queue.clear()


class Ray:
    """The part of Ray that lanes and driver use, with every choice made by the test."""

    exceptions = Exceptions

    def __init__(
        self, order: list[int], poison: set[int], once: set[int], lag: int, problem: InputError | None = None
    ) -> None:
        self.ray, self.actors, self.lag, self.problem = self, [], lag, problem
        self.order = itertools.cycle(order)
        self.poison, self.once = poison, set(once)
        self.unreadable: set[int] = set()
        self.facts: dict[int, dict[str, str]] = {}
        self.deaths = 0
        self.together: list[tuple[int, ...]] = []

    def actor(self) -> Actor:
        self.actors.append(Actor(self))
        return self.actors[-1]

    def send(self, actor: Actor, item: int) -> Ref:
        assert actor.alive, "work for a dead worker"
        ref = Ref()
        actor.queue.append((ref, item))
        self.together.append(tuple(i for _, i in (*actor.finished, *actor.queue)))
        return ref

    def dies(self, item: int) -> bool:
        if item in self.poison or item in self.once:
            self.once.discard(item)
            self.deaths += 1
            return True
        return False

    def wait(self, refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        while not (ready := [ref for ref in refs if ref.done or ref.lost]):
            busy = [actor for actor in self.actors if actor.queue]
            assert busy, "the driver waits for what nobody will ever answer"
            busy[next(self.order) % len(busy)].step()
        return ready[:num_returns], []

    def get(self, ref: Ref) -> Any:
        if ref.lost:
            raise ref.lost
        assert ref.done
        return ref.value

    def kill(self, actor: Actor) -> None:
        actor.die()


def run(ray: Ray, items: int, lanes: int, prefetch: int, losses: int) -> dict[int, Outcome[int, Any]]:
    options = EngineOptions(name="ray", devices=("cpu",) * lanes, prefetch=prefetch, losses=losses)
    found = list(drive(ray, [Lane(ray) for _ in range(lanes)], Waiting(iter(range(items))), options))
    assert sorted(outcome.item for outcome in found) == list(range(items)), "one outcome an item"
    return {outcome.item: outcome for outcome in found}


KEYS = st.integers(0, 39)


@given(
    items=st.integers(0, 40),
    lanes=st.integers(1, 4),
    prefetch=st.integers(0, 3),
    losses=st.integers(2, 4),
    lag=st.integers(0, 2),
    poison=st.sets(KEYS, max_size=4),
    once=st.sets(KEYS, max_size=4),
    order=st.lists(st.integers(0, 11), min_size=1, max_size=20),
)
def test_only_the_poisonous_are_set_aside(
    items: int, lanes: int, prefetch: int, losses: int, lag: int, poison: set[int], once: set[int], order: list[int]
) -> None:
    poison, once = {i for i in poison if i < items}, {i for i in once if i < items}
    ray = Ray(order, poison, once - poison, lag)
    found = run(ray, items, lanes, prefetch, losses)
    assert {item for item, outcome in found.items() if not outcome.ok} == poison
    assert all(found[item].error_kind == "WorkerDied" for item in poison)
    assert all(found[item].value == item * item for item in found.keys() - poison)
    # One worker is lost to find out, and as many as the limit allows to be sure.
    assert ray.deaths <= len(poison) * (losses + 1) + len(once - poison)


def test_after_a_death_each_of_that_queue_goes_alone() -> None:
    ray = Ray(order=[0], poison={1}, once=set(), lag=1)
    found = run(ray, items=6, lanes=1, prefetch=2, losses=3)
    assert [item for item, outcome in found.items() if not outcome.ok] == [1]
    assert found[1].attempts == 3
    # 0 had been answered for, but its answer died with the worker of 1.
    assert (0, 1, 2) in ray.together
    again = ray.together[ray.together.index((0, 1, 2)) + 1 :]
    assert {together for together in again if set(together) & {0, 1, 2}} == {(0,), (1,), (2,)}


def test_one_item_alone_leaves_the_other_lanes_full() -> None:
    ray = Ray(order=[0], poison=set(), once=set(), lag=0)
    lanes: list[Lane[int]] = [Lane(ray) for _ in range(3)]
    for lane in lanes:
        lane.admit()
    waiting = Waiting(iter(range(100)))
    fill(lanes, waiting, prefetch=1)
    assert [[flight.item for flight in lane.queue] for lane in lanes] == [[0, 3], [1, 4], [2, 5]]
    suspect = lanes[0].pop()
    suspect.alone = True
    waiting.put(suspect)
    lanes[1].pop()
    fill(lanes, waiting, prefetch=1)
    # Lane 0 has the shortest queue (with lane 1) and is set apart; lane 1 is filled up; lane 2 is full.
    assert [[flight.item for flight in lane.queue] for lane in lanes] == [[3], [4, 6], [2, 5]]
    lanes[0].pop()
    fill(lanes, waiting, prefetch=1)
    assert [[flight.item for flight in lane.queue] for lane in lanes] == [[0], [4, 6], [2, 5]]
    fill(lanes, waiting, prefetch=1)
    assert [flight.item for flight in lanes[0].queue] == [0], "nothing queues behind it"


def test_a_series_too_large_to_read_costs_nobody_else_anything() -> None:
    """Out of memory in the task that reads: the actor and what stands behind it go on."""
    ray = Ray(order=[0], poison=set(), once=set(), lag=0)
    ray.unreadable = {4}
    found = run(ray, items=9, lanes=2, prefetch=1, losses=3)
    assert [item for item, outcome in found.items() if not outcome.ok] == [4]
    assert (found[4].error_kind, found[4].attempts) == ("WorkerDied", 3)
    assert "out of memory" in str(found[4].error)
    assert len(ray.actors) == 2, "no actor was lost"


def test_a_node_of_another_version_is_named_and_the_others_do_its_work(caplog: pytest.LogCaptureFixture) -> None:
    ray = Ray(order=[0], poison=set(), once=set(), lag=0)
    ray.facts = {1: {**node_facts(), "ctpipe": "9.9"}}
    found = run(ray, items=8, lanes=2, prefetch=1, losses=3)
    assert all(outcome.ok for outcome in found.values())
    (said,) = caplog.messages
    assert "node n1" in said
    assert "runs ctpipe 9.9" in said
    assert not ray.actors[1].alive


def test_nodes_that_are_all_of_another_version_end_the_run() -> None:
    ray = Ray(order=[0], poison=set(), once=set(), lag=0)
    ray.facts = {number: {**node_facts(), "python": "3.99"} for number in range(2)}
    with pytest.raises(InputError, match=r"on Python 3\.99; expected ctpipe .* as on the driver"):
        run(ray, items=8, lanes=2, prefetch=1, losses=3)


def test_the_reason_is_raised_when_no_lane_is_left() -> None:
    problem = InputError("no store at this path", expected="a store that workers see", remedy="Use a shared path.")
    with pytest.raises(InputError, match="no store at this path"):
        run(Ray([0], set(), set(), 0, problem), items=3, lanes=2, prefetch=1, losses=3)
