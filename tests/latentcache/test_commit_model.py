"""The protocol's model: no fault in any order of events, and each guard is there for a fault that it prevents."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest

from tests.support.commit_model import Kind, Rules, budget_of, explore

KINDS: tuple[Kind, ...] = ("add", "merge", "gc", "pin")


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("kinds", list(combinations_with_replacement(KINDS, 2)))
def test_two_processes_in_every_order(kinds: tuple[Kind, ...], conditional: bool) -> None:
    rules = Rules(conditional)
    found = explore(kinds, rules, **budget_of(rules))
    assert found.fault == "", "\n".join(found.way)
    assert found.states > 10


@pytest.mark.slow
@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize("kinds", list(combinations_with_replacement(KINDS, 3)))
def test_three_processes_in_every_order(kinds: tuple[Kind, ...], conditional: bool) -> None:
    rules = Rules(conditional)
    found = explore(kinds, rules, **budget_of(rules))
    assert found.fault == "", "\n".join(found.way)


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
