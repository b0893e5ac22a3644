"""An executable model of the commit protocol, explored exhaustively: every order of every request of every process.

A process is a driver that adds rows, one that merges fragments, gc, or a training run that pins a snapshot. Between any
two requests another process may go on, a process may crash, an answer may be lost (the store did it, the caller is told
that it failed), the lease may look dead to another although its holder only sleeps (a stopped process, a jump of a
clock), a renewal that was under way may arrive late, the put of a snapshot may arrive a second time, whenever (a client
that tried again), and a listing of snapshots may lack the newest. Steps are those of latentcache.writer and
latentcache.maintenance, by name. infra/bench/commit_model.py explores every set of three processes: millions of states.

States that differ in nothing that any later step can see are visited once (see ``Keys``): processes of one kind may
change places, and what a process remembers counts only as long as it may still look at it. A step that neither reads
nor writes what others see is taken together with the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, permutations
from typing import Any, Literal, NamedTuple

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


class Process(NamedTuple):
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


class World(NamedTuple):
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
        return self._replace(snapshots=tuple(sorted((*kept, (number, body)), key=lambda pair: pair[0])))

    def without_snapshot(self, number: int, name_kept: bool) -> World:
        dropped = self.dropped | {number} if name_kept else self.dropped
        return self._replace(snapshots=tuple(pair for pair in self.snapshots if pair[0] != number), dropped=dropped)

    def taken(self, number: int) -> bool:
        """Whether a snapshot's name is: it stands, or was dropped."""
        return self.body(number) is not None or number in self.dropped

    def lagging(self) -> World | None:
        """The world as a listing shows it that lacks the newest snapshot; None where it has but one."""
        return self._replace(snapshots=self.snapshots[:-1]) if len(self.snapshots) > 1 else None

    def having(self, i: int, **changes: Any) -> World:
        process = self.processes[i]._replace(**changes)
        return self._replace(processes=(*self.processes[:i], process, *self.processes[i + 1 :]))


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
        arrived = world._replace(again=None)
        yield arrived if rules.conditional and world.taken(number) else arrived.with_snapshot(number, body)
    for i, process in enumerate(world.processes):
        if process.at in DONE:
            continue
        yield from _pin(world, i) if process.kind == "pin" else _driver(world, i, rules)
        if world.crashes:
            end = "crashed after put" if process.put else "crashed"
            yield world.having(i, at=end, renewing=False)._replace(crashes=world.crashes - 1)
        if process.renewing:
            yield world.having(i, renewing=False)._replace(lease=i)
        elif world.lease == i and world.sleeps and process.kind != "pin":
            # A renewal has read its own token and is on its way.
            yield world.having(i, renewing=True)._replace(sleeps=world.sleeps - 1)


def _pin(world: World, i: int) -> Iterator[World]:
    """pins.pin: the pin first, then whether its snapshot is there."""
    process = world.processes[i]
    if process.at == "start":
        yield world.having(i, at="chosen", number=world.last[0])
    elif process.at == "chosen":
        yield world.having(i, at="pinned")._replace(pins=world.pins | {process.number})
    elif process.at == "pinned":
        if process.number in world.marks:
            yield world.having(i, at="failed")._replace(pins=world.pins - {process.number})
        else:
            yield world.having(i, at="unmarked")
    elif world.body(process.number) is not None:
        yield world.having(i, at="ended")
    else:
        yield world.having(i, at="failed")._replace(pins=world.pins - {process.number})


def _driver(world: World, i: int, rules: Rules) -> Iterator[World]:
    process = world.processes[i]
    match process.at:
        case "start":  # Lease.acquire, _wait_for
            holder = world.lease
            if holder < 0 or world.processes[holder].at in DONE:
                yield world.having(i, at="take")
            elif world.sleeps:
                yield world.having(i, at="take")._replace(sleeps=world.sleeps - 1)
            yield world.having(i, at="failed")  # told that another command is committing
        case "take":  # _write
            yield world.having(i, at="taken")._replace(lease=i)
        case "taken":  # check
            # Without conditional puts acquire() sleeps first: a rival that found the lease free has written by then,
            # or is one of those that sleep longer.
            late = not rules.conditional and any(p.at == "take" for p in world.processes)
            if late and not world.sleeps:
                return
            slept = world._replace(sleeps=world.sleeps - 1) if late else world
            yield slept.having(i, at="load" if world.lease == i else "failed")
        case "load":
            after = "collect" if process.kind == "gc" else "write"
            number, body = world.last
            yield _written(world.having(i, at=after, number=number, base=body), i)
            if world.lags and (shown := world.lagging()):
                number, body = shown.last
                late_world = world._replace(lags=world.lags - 1)
                yield _written(late_world.having(i, at=after, number=number, base=body), i)
        case "write":
            yield _write(world, i)
        case "check" | "restore" | "look" | "store" | "confirm":
            yield from _publish(world, i, rules)
        case "collect" | "mark" | "pins again" | "drop" | "delete":
            yield from _collect(world, i, rules)
        case "end":  # __exit__: put back what a late driver replaced
            if process.own is not None and _restores(process, rules) and world.lease == i:
                number, body = process.own
                held = world.body(number)
                yield (world if held in (None, body) else world.with_snapshot(number, body)).having(i, at="release")
            else:
                yield world.having(i, at="release")
        case "release":
            freed = world._replace(lease=-1) if world.lease == i else world
            yield freed.having(i, at="ended", renewing=False)


def _restores(process: Process, rules: Rules) -> bool:
    """Whether it would put its last snapshot back: where it would not, that step is none."""
    return not rules.conditional and rules.confirm and process.own is not None


def _before_store(rules: Rules) -> str:
    """Whether the look at the name is a step of its own: not where the put looks again, and no name is ever freed."""
    return "store" if rules.conditional and rules.names_kept else "look"


def _ending(process: Process, rules: Rules) -> str:
    return "end" if _restores(process, rules) else "release"


def _written(world: World, i: int) -> World:
    """At once, where no gc could see the fragment that is written."""
    if world.processes[i].at != "write" or any(p.kind == "gc" for p in world.processes):
        return world
    return _write(world, i)


def _write(world: World, i: int) -> World:
    """Writer._publish, extend: a new fragment, alone or merged with all before it."""
    process = world.processes[i]
    rows = frozenset({(i, process.commits)})
    if process.kind == "merge":
        rows |= rows_of(process.base)
    made = (i, process.commits, rows)
    return world.having(i, at="check", mine=made)._replace(fragments=world.fragments | {made})


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
            at = "restore" if _restores(process, rules) else _before_store(rules)
            yield world.having(i, at=at if world.lease == i else "failed")
        case "restore":
            assert process.own is not None
            held = world.body(process.own[0])
            again = world if held in (None, process.own[1]) else world.with_snapshot(*process.own)
            yield again.having(i, at=_before_store(rules))
        case "look":
            yield world.having(i, at="failed" if world.taken(number) else "store")
        case "store":
            if rules.conditional and world.taken(number):
                yield world.having(i, at="failed")
                return
            stored = world.with_snapshot(number, body)
            if world.repeats:
                twice = stored._replace(again=(number, body), repeats=world.repeats - 1)
                yield _acknowledged(twice, i, number, body, rules)
            if world.lost:
                yield stored.having(i, at="failed after put", put=True)._replace(lost=world.lost - 1)
            if rules.conditional or not rules.confirm:
                yield _acknowledged(stored, i, number, body, rules)
            else:
                yield stored.having(i, at="confirm", put=True)
        case "confirm":
            if world.lease == i and world.body(number) == body:
                yield _acknowledged(world, i, number, body, rules)
            else:
                yield world.having(i, at="failed after put")


def _acknowledged(world: World, i: int, number: int, body: Body, rules: Rules) -> World:
    process = world.processes[i]
    done = process.commits + 1
    if process.kind == "gc":
        return world.having(i, at="drop", number=number, base=body, own=(number, body), put=False)
    process = process._replace(own=(number, body))
    told = world._replace(acknowledged=world.acknowledged | {(i, process.commits)})
    after = "write" if process.kind == "add" and done < 2 else _ending(process, rules)
    return _written(
        told.having(i, at=after, number=number, base=body, own=process.own, commits=done, put=False, mine=None), i
    )


def _collect(world: World, i: int, rules: Rules) -> Iterator[World]:
    """gc._collect; everything that no snapshot names counts as older than the grace time."""
    process = world.processes[i]
    publish = "check" if rules.fence else "drop"
    match process.at:
        case "collect":
            yield _chosen(world, world, i, "mark" if rules.mark else publish, publish, rules)
            if world.lags and (shown := world.lagging()):
                chosen = _chosen(world, shown, i, "mark" if rules.mark else publish, publish, rules)
                yield chosen._replace(lags=world.lags - 1)
        case "mark":
            marked = world.marks | {number for number, _ in process.doomed}
            yield world.having(i, at="pins again")._replace(marks=marked)
        case "pins again":
            doomed = tuple(pair for pair in process.doomed if pair[0] not in world.pins)
            again = world.having(i, doomed=doomed, listed=process.listed & _unnamed(world, doomed))
            yield again.having(i, at=publish)
        case "drop":
            if process.doomed:
                (number, _), *rest = process.doomed
                yield world.without_snapshot(number, rules.names_kept).having(i, doomed=tuple(rest))
            else:
                yield world.having(i, at="delete")._replace(marks=frozenset())
        case "delete":
            for gone in process.listed:  # their names are random, and so is their order
                left = process.listed - {gone}
                yield world.having(i, listed=left)._replace(fragments=world.fragments - {gone})
            if not process.listed:
                yield world.having(i, at=_ending(process, rules))


def _chosen(world: World, shown: World, i: int, after: str, publish: str, rules: Rules) -> World:
    """What gc takes for garbage, by the listing that it is shown and the snapshot that it builds on."""
    process = world.processes[i]
    kept = {*shown.pins, shown.last[0], process.number}
    doomed = tuple(pair for pair in shown.snapshots if pair[0] not in kept)
    listed = _unnamed(shown, doomed) - (process.base if rules.base else frozenset())
    at = after if doomed else publish if listed else _ending(process, rules)
    return world.having(i, doomed=doomed, listed=listed, at=at)


def _unnamed(world: World, doomed: tuple[tuple[int, Body], ...]) -> frozenset[Fragment]:
    """Fragments that no snapshot names but the doomed ones."""
    numbers = {number for number, _ in doomed}
    return world.fragments - {f for number, body in world.snapshots if number not in numbers for f in body}


class Keys:
    """One key for all states from which the same can follow, as small numbers; and a state of that key.

    What is left out: all that a process that is done remembers, but that a pin stands and that a driver was told of a
    put that may have been made; the last snapshot of a process that never puts it back; marks without a run that could
    heed them; the lease of a process that is done; fragments that nothing names, once no gc will look for them; what
    older snapshots name, without a gc that could delete it. Of states that differ only in which of several processes of
    one kind did what, one stands for all.
    """

    def __init__(self, kinds: Sequence[Kind], rules: Rules) -> None:
        places = range(len(kinds))
        self._rules = rules
        self._orders = [p for p in permutations(places) if all(kinds[i] == kinds[p[i]] for i in places)]
        self._groups = [(i, j) for i in places for j in places if i < j and kinds[i] == kinds[j]]
        self._ids: dict[Any, int] = {}
        self._values: list[Any] = []
        self._renamed: dict[tuple[int, int], int] = {}
        self._lasting: dict[Process, Process] = {}

    def of(self, world: World) -> tuple[int, ...]:
        world = self._normal(world)
        known = [self._id(part) for part in world.processes]
        rest = [self._id(part) for part in (world.snapshots, world.fragments, world.acknowledged, world.again)]
        others = self._id((world.pins, world.marks, world.dropped))
        budget = self._id((world.crashes, world.lost, world.sleeps, world.repeats, world.lags))
        found: list[tuple[int, ...]] = []
        for number, order in self._fitting(world):
            processes = [0] * len(known)
            for i, one in enumerate(known):
                processes[order[i]] = self._rename(one, number)
            lease = order[world.lease] if world.lease >= 0 else -1
            found.append((*processes, *(self._rename(one, number) for one in rest), lease, others, budget))
        return min(found)

    def world(self, key: tuple[int, ...]) -> World:
        *processes, snapshots, fragments, acknowledged, again, lease, others, budget = key
        values = self._values
        pins, marks, dropped = values[others]
        return World(
            tuple(values[one] for one in processes),
            values[snapshots],
            values[fragments],
            lease,
            pins,
            marks,
            dropped,
            values[again],
            values[acknowledged],
            *values[budget],
        )

    def _id(self, value: Any) -> int:
        found = self._ids.setdefault(value, len(self._values))
        if found == len(self._values):
            self._values.append(value)
        return found

    def _fitting(self, world: World) -> list[tuple[int, tuple[int, ...]]]:
        """The orders of like processes that put them in the order of what needs no name."""
        if not self._groups:
            return [(0, self._orders[0])]
        seen = [
            (p.at, p.number, p.commits, p.renewing, p.put, len(p.base), len(p.listed), i == world.lease)
            for i, p in enumerate(world.processes)
        ]
        out = []
        for number, order in enumerate(self._orders):
            placed = [seen[0]] * len(seen)
            for i, j in enumerate(order):
                placed[j] = seen[i]
            if all(placed[i] <= placed[j] for i, j in self._groups):
                out.append((number, order))
        return out

    def _rename(self, one: int, number: int) -> int:
        if number == 0:  # the order as it is
            return one
        if (one, number) not in self._renamed:
            self._renamed[one, number] = self._id(_renamed(self._values[one], self._orders[number]))
        return self._renamed[one, number]

    def _normal(self, world: World) -> World:
        at = [p.at for p in world.processes]
        collectors = [p.at for p in world.processes if p.kind == "gc" and p.at not in DONE]
        processes = tuple([self._lasting.get(p) or self._last(p) for p in world.processes])
        lease = -1 if world.lease >= 0 and at[world.lease] in DONE else world.lease
        runs = any(p.kind == "pin" and p.at in ("start", "chosen", "pinned") for p in world.processes)
        marks = world.marks if runs else frozenset()
        snapshots = world.snapshots
        if self._rules.conditional and not collectors and len(snapshots) > 2:
            snapshots = (*((number, frozenset[Fragment]()) for number, _ in snapshots[:-2]), *snapshots[-2:])
        fragments = world.fragments
        if all(one in LISTED for one in collectors):
            fragments &= _named(snapshots, processes, world.again)
        return world._replace(processes=processes, lease=lease, marks=marks, snapshots=snapshots, fragments=fragments)

    def _last(self, process: Process) -> Process:
        """What a process still needs of what it remembers."""
        lasting = process
        if process.at in DONE:
            told = process.at in ("failed after put", "crashed after put")
            lasting = Process(process.kind, "failed after put" if told else "ended")
            if process.kind == "pin":
                stands = process.at == "ended"
                lasting = Process("pin", process.at if stands else "failed", process.number if stands else -1)
        else:
            if not _restores(process, self._rules) or process.at == "release":
                lasting = lasting._replace(own=None)
            if process.at in ("end", "release"):
                lasting = lasting._replace(number=-1, base=frozenset(), mine=None, commits=0)
            if process.at in ("drop", "delete"):
                lasting = lasting._replace(number=-1, base=frozenset())
        self._lasting[process] = lasting
        return lasting


LISTED = ("check", "restore", "look", "store", "confirm", "drop", "delete", "end", "release")
"""Where a gc has looked for garbage, and will not look again."""


def _named(
    snapshots: tuple[tuple[int, Body], ...], processes: tuple[Process, ...], again: tuple[int, Body] | None
) -> frozenset[Fragment]:
    """Fragments that a snapshot names, or may name yet."""
    found = {f for _, body in snapshots for f in body}
    for process in processes:
        found |= process.base
        if process.mine is not None:
            found.add(process.mine)
        if process.own is not None:
            found |= process.own[1]
    return frozenset(found if again is None else found | again[1])


def _renamed(value: Any, order: tuple[int, ...]) -> Any:
    """A part of a state with other writers' names."""

    def fragment(one: Fragment) -> Fragment:
        return (order[one[0]], one[1], rows(one[2]))

    def rows(some: frozenset[Row]) -> frozenset[Row]:
        return frozenset((order[writer], attempt) for writer, attempt in some)

    def body(one: Body) -> Body:
        return frozenset(map(fragment, one))

    match value:
        case Process():
            return value._replace(
                base=body(value.base),
                mine=value.mine and fragment(value.mine),
                own=value.own and (value.own[0], body(value.own[1])),
                doomed=tuple((number, body(one)) for number, one in value.doomed),
                listed=body(value.listed),
            )
        case frozenset():  # fragments, or rows
            return frozenset(fragment(one) if len(one) == 3 else (order[one[0]], one[1]) for one in value)
        case (int(number), frozenset() as one):  # a put that arrives again
            return (number, body(one))
        case tuple():
            return tuple((number, body(one)) for number, one in value)
    return value


@dataclass
class Explored:
    """How many states were seen, and the first fault with the way to it."""

    states: int = 0
    fault: str = ""
    way: tuple[str, ...] = ()


def explore(kinds: tuple[Kind, ...], rules: Rules, most: int | None = None, **budget: int) -> Explored:
    """Visit every state that these processes can reach, breadth first, up to ``most``."""
    first = World(tuple(Process(kind) for kind in kinds), **budget)
    keys = Keys(kinds, rules)
    before: dict[tuple[int, ...], tuple[int, ...] | None] = {keys.of(first): None}
    found = Explored()
    layer = list(before)
    while layer:
        following: list[tuple[int, ...]] = []
        for key in layer:
            found.states += 1
            world = keys.world(key)
            for fault in faults(world, rules):
                return Explored(found.states, fault, _way(key, before, first, keys, rules))
            if most is not None and found.states >= most:
                return found
            for after in map(keys.of, steps(world, rules)):
                if after not in before:
                    before[after] = key
                    following.append(after)
        layer = following
    return found


def _way(
    key: tuple[int, ...],
    before: dict[tuple[int, ...], tuple[int, ...] | None],
    first: World,
    keys: Keys,
    rules: Rules,
) -> tuple[str, ...]:
    """The way to a state, told with the processes in their own places."""
    way: list[tuple[int, ...]] = []
    step: tuple[int, ...] | None = key
    while step is not None:
        way.append(step)
        step = before[step]
    lines, world = list[str](), first
    for following in reversed(way):
        world = next((after for after in steps(world, rules) if keys.of(after) == following), world)
        lines.append(
            " ".join(f"{p.kind}:{p.at}" for p in world.processes) + f" snapshots {[n for n, _ in world.snapshots]}"
        )
    return tuple(lines)


def budget_of(rules: Rules) -> dict[str, int]:
    """What may go wrong while a kind of store is explored; infra/docs/store-guarantees.md says why they differ."""
    return {"crashes": 2, "lost": 1, "sleeps": 1 if rules.conditional else 0}


def odd_budget_of(rules: Rules) -> dict[str, int]:
    """More of what may go wrong: two sleeps, a put that arrives twice and a listing that lags, where that is safe."""
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
