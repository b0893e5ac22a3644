"""An executable model of the commit protocol, explored exhaustively: every order of every request of every process.

A process is a driver that adds rows, one that merges fragments, gc, or a training run that pins a snapshot. Between any
two requests another process may go on, a process may crash, an answer may be lost (the store did it, the caller is told
that it failed), the lease may look dead to another although its holder only sleeps (a stopped process, a jump of a
clock), a renewal that was under way may arrive late, the put of a snapshot may arrive a second time, whenever (a client
that tried again), and a listing of snapshots may lack the newest. Steps are those of latentcache.writer and
latentcache.maintenance, by name. infra/bench/commit_model.py explores every set of three processes: millions of states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from typing import Literal

Kind = Literal["add", "merge", "gc", "pin"]
Row = tuple[int, int]
Fragment = tuple[int, int, frozenset[Row]]
"""Writer, its attempt, and the rows within."""
Body = frozenset[Fragment]
DONE = ("ended", "failed", "failed after put", "crashed", "crashed after put")


@dataclass(frozen=True)
class Rules:
    """What the store honours, and which guards the code has: without one, the model shows what it is for."""

    conditional: bool = True
    fence: bool = True
    """gc publishes a snapshot before it deletes."""
    mark: bool = True
    """gc marks the snapshots that it will drop, then looks at the pins again; a pin heeds the marks."""
    base: bool = True
    """gc spares what the snapshot names that it builds on, whether a listing shows that one or not."""
    names_kept: bool = True
    """A snapshot that is dropped leaves its name taken."""
    confirm: bool = True
    """Without conditional puts, a commit counts only if the lease and the snapshot still stand after it."""


@dataclass(frozen=True)
class Process:
    """One process: where it stands, and what it remembers."""

    kind: Kind
    at: str = "start"
    number: int = -1
    base: Body = frozenset()
    mine: Fragment | None = None
    commits: int = 0
    own: tuple[int, Body] | None = None
    """The last snapshot that it committed itself."""
    doomed: tuple[tuple[int, Body], ...] = ()
    listed: frozenset[Fragment] = frozenset()
    renewing: bool = False
    put: bool = False


@dataclass(frozen=True)
class World:
    """Everything that the next step may depend on."""

    processes: tuple[Process, ...]
    snapshots: tuple[tuple[int, Body], ...] = ((0, frozenset()),)
    fragments: frozenset[Fragment] = frozenset()
    lease: int = -1
    pins: frozenset[int] = frozenset()
    marks: frozenset[int] = frozenset()
    dropped: frozenset[int] = frozenset()
    """Snapshots that are gone and whose names are taken."""
    again: tuple[int, Body] | None = None
    """The put of a snapshot that is to arrive a second time."""
    acknowledged: frozenset[Row] = frozenset()
    crashes: int = 1
    lost: int = 1
    sleeps: int = 1
    repeats: int = 0
    lags: int = 0

    def body(self, number: int) -> Body | None:
        return dict(self.snapshots).get(number)

    @property
    def last(self) -> tuple[int, Body]:
        return max(self.snapshots, key=lambda pair: pair[0])

    def with_snapshot(self, number: int, body: Body) -> World:
        kept = tuple(pair for pair in self.snapshots if pair[0] != number)
        return replace(self, snapshots=tuple(sorted((*kept, (number, body)), key=lambda pair: pair[0])))

    def without_snapshot(self, number: int, name_kept: bool) -> World:
        dropped = self.dropped | {number} if name_kept else self.dropped
        return replace(self, snapshots=tuple(pair for pair in self.snapshots if pair[0] != number), dropped=dropped)

    def taken(self, number: int) -> bool:
        """Whether a snapshot's name is: it stands, or was dropped."""
        return self.body(number) is not None or number in self.dropped

    def lagging(self) -> World | None:
        """The world as a listing shows it that lacks the newest snapshot; None where it has but one."""
        return replace(self, snapshots=self.snapshots[:-1]) if len(self.snapshots) > 1 else None

    def having(self, i: int, **changes: object) -> World:
        process = replace(self.processes[i], **changes)  # type: ignore[arg-type]
        return replace(self, processes=(*self.processes[:i], process, *self.processes[i + 1 :]))


def rows_of(body: Body) -> frozenset[Row]:
    return frozenset(row for _, _, rows in body for row in rows)


def faults(world: World, rules: Rules) -> Iterator[str]:
    """What must never be, in any state."""
    for number, body in world.snapshots:
        if not body <= world.fragments:
            yield f"snapshot {number} names a fragment that is gone"
    for number in world.pins:
        told = any(p.kind == "pin" and p.number == number and p.at == "ended" for p in world.processes)
        if told and world.body(number) is None:
            yield f"snapshot {number} is pinned and gone"
    if world.acknowledged <= rows_of(world.last[1]):
        return
    if rules.conditional:
        yield "a commit that was reported as done is not in the last snapshot"
    elif all(p.at in DONE for p in world.processes):
        told = any(p.at in ("failed after put", "crashed after put") for p in world.processes)
        if not told:
            yield "a commit that was reported as done is gone, and no driver was told"


def steps(world: World, rules: Rules) -> Iterator[World]:
    """Every world that the next request, crash, loss or sleep can lead to."""
    if world.again is not None:
        number, body = world.again
        arrived = replace(world, again=None)
        yield arrived if rules.conditional and world.taken(number) else arrived.with_snapshot(number, body)
    for i, process in enumerate(world.processes):
        if process.at in DONE:
            continue
        yield from _pin(world, i) if process.kind == "pin" else _driver(world, i, rules)
        if world.crashes:
            end = "crashed after put" if process.put else "crashed"
            yield replace(world.having(i, at=end, renewing=False), crashes=world.crashes - 1)
        if process.renewing:
            yield replace(world.having(i, renewing=False), lease=i)
        elif world.lease == i and world.sleeps and process.kind != "pin":
            # A renewal has read its own token and is on its way.
            yield replace(world.having(i, renewing=True), sleeps=world.sleeps - 1)


def _pin(world: World, i: int) -> Iterator[World]:
    """pins.pin: the pin first, then whether its snapshot is there."""
    process = world.processes[i]
    if process.at == "start":
        yield world.having(i, at="chosen", number=world.last[0])
    elif process.at == "chosen":
        yield replace(world.having(i, at="pinned"), pins=world.pins | {process.number})
    elif process.at == "pinned":
        if process.number in world.marks:
            yield replace(world.having(i, at="failed"), pins=world.pins - {process.number})
        else:
            yield world.having(i, at="unmarked")
    elif world.body(process.number) is not None:
        yield world.having(i, at="ended")
    else:
        yield replace(world.having(i, at="failed"), pins=world.pins - {process.number})


def _driver(world: World, i: int, rules: Rules) -> Iterator[World]:
    process = world.processes[i]
    match process.at:
        case "start":  # Lease.acquire, _wait_for
            holder = world.lease
            if holder < 0 or world.processes[holder].at in DONE:
                yield world.having(i, at="take")
            elif world.sleeps:
                yield replace(world.having(i, at="take"), sleeps=world.sleeps - 1)
            yield world.having(i, at="failed")  # told that another command is committing
        case "take":  # _write
            yield replace(world.having(i, at="taken"), lease=i)
        case "taken":  # check
            # Without conditional puts acquire() sleeps first: a rival that found the lease free has written by then,
            # or is one of those that sleep longer.
            late = not rules.conditional and any(p.at == "take" for p in world.processes)
            if late and not world.sleeps:
                return
            slept = replace(world, sleeps=world.sleeps - 1) if late else world
            yield slept.having(i, at="load" if world.lease == i else "failed")
        case "load":
            after = "collect" if process.kind == "gc" else "write"
            number, body = world.last
            yield world.having(i, at=after, number=number, base=body)
            if world.lags and (shown := world.lagging()):
                number, body = shown.last
                yield replace(world.having(i, at=after, number=number, base=body), lags=world.lags - 1)
        case "write":  # extend: a new fragment, alone or merged with all before it
            rows = frozenset({(i, process.commits)})
            if process.kind == "merge":
                rows |= rows_of(process.base)
            made = (i, process.commits, rows)
            yield replace(world.having(i, at="check", mine=made), fragments=world.fragments | {made})
        case "check" | "restore" | "look" | "store" | "confirm":
            yield from _publish(world, i, rules)
        case "collect" | "mark" | "pins again" | "drop" | "delete":
            yield from _collect(world, i, rules)
        case "end":  # __exit__: put back what a late driver replaced
            if not rules.conditional and rules.confirm and process.own and world.lease == i:
                number, body = process.own
                held = world.body(number)
                yield (world if held in (None, body) else world.with_snapshot(number, body)).having(i, at="release")
            else:
                yield world.having(i, at="release")
        case "release":
            freed = replace(world, lease=-1) if world.lease == i else world
            yield freed.having(i, at="ended", renewing=False)


def _next_body(process: Process) -> Body:
    if process.mine is None:
        return process.base  # gc's fence
    return frozenset({process.mine}) if process.kind == "merge" else process.base | {process.mine}


def _publish(world: World, i: int, rules: Rules) -> Iterator[World]:
    """Writer._put."""
    process = world.processes[i]
    number, body = process.number + 1, _next_body(process)
    match process.at:
        case "check":
            yield world.having(i, at="restore" if world.lease == i else "failed")
        case "restore":
            again = world
            if not rules.conditional and rules.confirm and process.own:
                held = world.body(process.own[0])
                again = world if held in (None, process.own[1]) else world.with_snapshot(*process.own)
            yield again.having(i, at="look")
        case "look":
            yield world.having(i, at="failed" if world.taken(number) else "store")
        case "store":
            if rules.conditional and world.taken(number):
                yield world.having(i, at="failed")
                return
            stored = world.with_snapshot(number, body)
            if world.repeats:
                twice = replace(stored, again=(number, body), repeats=world.repeats - 1)
                yield _acknowledged(twice, i, number, body)
            if world.lost:
                yield replace(stored.having(i, at="failed after put", put=True), lost=world.lost - 1)
            if rules.conditional or not rules.confirm:
                yield _acknowledged(stored, i, number, body)
            else:
                yield stored.having(i, at="confirm", put=True)
        case "confirm":
            if world.lease == i and world.body(number) == body:
                yield _acknowledged(world, i, number, body)
            else:
                yield world.having(i, at="failed after put")


def _acknowledged(world: World, i: int, number: int, body: Body) -> World:
    process = world.processes[i]
    done = process.commits + 1
    if process.kind == "gc":
        return world.having(i, at="drop", number=number, base=body, own=(number, body), put=False)
    told = replace(world, acknowledged=world.acknowledged | {(i, process.commits)})
    after = "write" if process.kind == "add" and done < 2 else "end"
    return told.having(i, at=after, number=number, base=body, own=(number, body), commits=done, put=False)


def _collect(world: World, i: int, rules: Rules) -> Iterator[World]:
    """gc._collect; everything that no snapshot names counts as older than the grace time."""
    process = world.processes[i]
    publish = "check" if rules.fence else "drop"
    match process.at:
        case "collect":
            yield _chosen(world, world, i, "mark" if rules.mark else publish, publish, rules)
            if world.lags and (shown := world.lagging()):
                chosen = _chosen(world, shown, i, "mark" if rules.mark else publish, publish, rules)
                yield replace(chosen, lags=world.lags - 1)
        case "mark":
            marked = world.marks | {number for number, _ in process.doomed}
            yield replace(world.having(i, at="pins again"), marks=marked)
        case "pins again":
            doomed = tuple(pair for pair in process.doomed if pair[0] not in world.pins)
            again = world.having(i, doomed=doomed, listed=process.listed & _unnamed(world, doomed))
            yield again.having(i, at=publish)
        case "drop":
            if process.doomed:
                (number, _), *rest = process.doomed
                yield world.without_snapshot(number, rules.names_kept).having(i, doomed=tuple(rest))
            else:
                yield replace(world.having(i, at="delete"), marks=frozenset())
        case "delete":
            if process.listed:
                gone = min(process.listed, key=lambda f: (f[0], f[1]))
                left = process.listed - {gone}
                yield replace(world.having(i, listed=left), fragments=world.fragments - {gone})
            else:
                yield world.having(i, at="end")


def _chosen(world: World, shown: World, i: int, after: str, publish: str, rules: Rules) -> World:
    """What gc takes for garbage, by the listing that it is shown and the snapshot that it builds on."""
    process = world.processes[i]
    kept = {*shown.pins, shown.last[0], process.number}
    doomed = tuple(pair for pair in shown.snapshots if pair[0] not in kept)
    listed = _unnamed(shown, doomed) - (process.base if rules.base else frozenset())
    at = after if doomed else publish if listed else "end"
    return world.having(i, doomed=doomed, listed=listed, at=at)


def _unnamed(world: World, doomed: tuple[tuple[int, Body], ...]) -> frozenset[Fragment]:
    """Fragments that no snapshot names but the doomed ones."""
    numbers = {number for number, _ in doomed}
    return world.fragments - {f for number, body in world.snapshots if number not in numbers for f in body}


@dataclass
class Explored:
    """How many states were seen, and the first fault with the way to it."""

    states: int = 0
    fault: str = ""
    way: tuple[str, ...] = ()


def explore(kinds: tuple[Kind, ...], rules: Rules, most: int | None = None, **budget: int) -> Explored:
    """Visit every state that these processes can reach, breadth first, up to ``most``."""
    first = World(tuple(Process(kind) for kind in kinds), **budget)  # type: ignore[arg-type]
    before: dict[World, World | None] = {first: None}
    found = Explored()
    layer = [first]
    while layer:
        following: list[World] = []
        for world in layer:
            found.states += 1
            for fault in faults(world, rules):
                return Explored(found.states, fault, _way(world, before))
            if most is not None and found.states >= most:
                return found
            for after in steps(world, rules):
                if after not in before:
                    before[after] = world
                    following.append(after)
        layer = following
    return found


def _way(world: World, before: dict[World, World | None]) -> tuple[str, ...]:
    lines: list[str] = []
    step: World | None = world
    while step is not None:
        lines.append(
            " ".join(f"{p.kind}:{p.at}" for p in step.processes) + f" snapshots {[n for n, _ in step.snapshots]}"
        )
        step = before[step]
    return tuple(reversed(lines))


def budget_of(rules: Rules) -> dict[str, int]:
    """What may go wrong while a kind of store is explored; infra/docs/store-guarantees.md says why they differ."""
    return {"crashes": 2, "lost": 1, "sleeps": 1 if rules.conditional else 0}


def odd_budget_of(rules: Rules) -> dict[str, int]:
    """For two processes: two sleeps, a put that arrives twice and a listing that lags as well, where that is safe."""
    if rules.conditional:
        return {"crashes": 2, "lost": 1, "sleeps": 2, "repeats": 1, "lags": 1}
    return {"crashes": 2, "lost": 1, "sleeps": 0, "repeats": 0, "lags": 1}


def sets_of(most: int) -> Iterator[tuple[tuple[Kind, ...], Rules, dict[str, int]]]:
    """Every set of up to ``most`` processes on both kinds of store, each with what may go wrong meanwhile."""
    kinds: tuple[Kind, ...] = ("add", "merge", "gc", "pin")
    for rules in (Rules(True), Rules(False)):
        for count in range(2, most + 1):
            for chosen in combinations_with_replacement(kinds, count):
                yield chosen, rules, odd_budget_of(rules) if count == 2 else budget_of(rules)
