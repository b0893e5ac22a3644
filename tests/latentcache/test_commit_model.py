"""The protocol's model: no fault in any order of events, and each guard is there for a fault that it prevents."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest

from tests.support.commit_model import (
    Keys,
    Kind,
    Process,
    Rules,
    World,
    budget_of,
    explore,
    faults,
    odd_budget_of,
    sets_of,
    steps,
)

KINDS: tuple[Kind, ...] = ("add", "merge", "gc", "pin")


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("kinds", list(combinations_with_replacement(KINDS, 2)))
def test_two_processes_in_every_order(kinds: tuple[Kind, ...], conditional: bool) -> None:
    rules = Rules(conditional)
    found = explore(kinds, rules, **budget_of(rules))
    assert found.fault == "", "\n".join(found.way)
    assert found.states > 10


def as_id(value: object) -> str | None:
    return " ".join(map(str, value)) if isinstance(value, tuple) else None


def every_state(kinds: tuple[Kind, ...], rules: Rules, budget: dict[str, int]) -> set[World]:
    """All states themselves, whether they differ in anything that matters or not."""
    first = World(tuple(Process(kind) for kind in kinds), **budget)
    seen, waiting = {first}, [first]
    while waiting:
        for after in steps(waiting.pop(), rules):
            if after not in seen:
                seen.add(after)
                waiting.append(after)
    return seen


@pytest.mark.parametrize(
    ("kinds", "rules"),
    [
        (("add", "add"), Rules()),
        pytest.param(("add", "gc"), Rules(), marks=pytest.mark.slow),
        (("add", "gc"), Rules(base=False)),
        (("merge", "gc"), Rules(fence=False)),
        (("gc", "gc"), Rules()),
        (("gc", "pin"), Rules(mark=False)),
        (("merge", "pin"), Rules()),
        (("add", "add"), Rules(False)),
        (("add", "gc"), Rules(False)),
        (("gc", "gc"), Rules(False)),
        pytest.param(("merge", "merge", "pin"), Rules(False), marks=pytest.mark.slow),
        (("pin", "pin", "gc"), Rules(False)),
    ],
    ids=as_id,
)
def test_states_of_one_key_lead_to_the_same(kinds: tuple[Kind, ...], rules: Rules) -> None:
    """One for each key is explored in place of all: it has the same faults, and steps to the same keys."""
    keys = Keys(kinds, rules)
    budget = {"crashes": 1, "lost": 1, "sleeps": 1, "repeats": 1 if rules.conditional else 0, "lags": 1}
    of_key: dict[tuple[int, ...], tuple[set[str], set[tuple[int, ...]]]] = {}
    for world in every_state(kinds, rules, budget):
        seen = set(faults(world, rules)), {keys.of(after) for after in steps(world, rules)}
        assert of_key.setdefault(keys.of(world), seen) == seen
    assert explore(kinds, rules, **budget).states <= len(of_key)
    if not any(found for found, _ in of_key.values()):
        assert explore(kinds, rules, **budget).states == len(of_key)


@pytest.mark.slow
@pytest.mark.parametrize(("kinds", "rules", "budget"), list(sets_of(3)), ids=as_id)
def test_three_processes_in_every_order(kinds: tuple[Kind, ...], rules: Rules, budget: dict[str, int]) -> None:
    """Some millions of states in all; of two processes with a put that arrives twice and a listing that lags too."""
    found = explore(kinds, rules, **budget)
    assert found.fault == "", "\n".join(found.way)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", list(combinations_with_replacement(("add", "merge"), 3)), ids="-".join)
def test_three_writers_with_all_that_two_processes_are_given(kinds: tuple[Kind, ...]) -> None:
    """Two crashes, a lost answer, two sleeps, a put that arrives twice and a listing that lags: 642,000 states."""
    found = explore(kinds, Rules(), **odd_budget_of(Rules()))
    assert found.fault == "", "\n".join(found.way)


@pytest.mark.slow
def test_without_the_names_of_dropped_snapshots_a_sleeping_driver_would_lose_its_commit() -> None:
    found = explore(("add", "add", "gc"), Rules(names_kept=False), crashes=0, lost=0, sleeps=1)
    assert found.fault == "a commit that was reported as done is not in the last snapshot"


def test_a_listing_that_lags_is_harmless_because_gc_spares_what_it_builds_on() -> None:
    budget = {"crashes": 0, "lost": 0, "sleeps": 1, "repeats": 1, "lags": 1}
    assert explore(("add", "gc"), Rules(), **budget).fault == ""
    assert "names a fragment that is gone" in explore(("add", "gc"), Rules(base=False), **budget).fault


@pytest.mark.parametrize(
    ("kinds", "rules", "fault"),
    [
        (("add", "gc"), Rules(fence=False), "names a fragment that is gone"),
        (("gc", "add", "pin"), Rules(mark=False), "is pinned and gone"),
    ],
)
def test_without_a_guard_the_model_shows_what_it_is_for(kinds: tuple[Kind, ...], rules: Rules, fault: str) -> None:
    assert fault in explore(kinds, rules, crashes=0, lost=1, sleeps=1).fault


def test_a_sleeping_driver_on_a_store_without_conditions_is_what_the_guarantees_leave_out() -> None:
    """infra/docs/store-guarantees.md says so; should a change of the protocol close it, this test is to say so."""
    assert "no driver was told" in explore(("add", "add"), Rules(False), crashes=1, lost=0, sleeps=2).fault
