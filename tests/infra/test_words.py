"""Prose that a newcomer understands: docstrings in the project's own vocabulary, decision pages that stay short.

Words that are gone are refused. Those on their way out may only become fewer: `AT_MOST` is lowered when they do.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("pipeline", "latentcache", "diffusion")
LONGEST_DECISION = 80

REFUSED = {
    "lattice": "grid, voxel grid",
    "round trip": "reconstruction",
    "ledger": "allocation tracker",
    "blamed": "suspected",
    "poisonous": "poison pill",
    "made up": "synthetic",
    "set aside": "excluded, quarantined",
    "a row a": "one row per",
}
"""Words of earlier days, and what says it better."""

AT_MOST = {"lies": 70, "its own": 60, "stands": 52, "told": 32, "said": 20}
OPENINGS = ("That", "What", "Which", "Who", "Where", "How")
OPENINGS_AT_MOST = 275


def docstrings() -> Iterator[tuple[str, str]]:
    """(where, text) of every docstring, and of every string that documents a constant, of the library."""
    for package in LIBRARY:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    text = node.value.value
                    if isinstance(text, str):
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", text.strip()


def found(word: str, text: str) -> bool:
    return re.search(rf"\b{word}\b", " ".join(text.split())) is not None


@pytest.mark.parametrize("word", sorted(REFUSED))
def test_a_word_that_is_gone_stays_away(word: str) -> None:
    where = [place for place, text in docstrings() if found(word, text)]
    assert where == [], f"say {REFUSED[word]!r} instead of {word!r}"


def test_words_on_their_way_out_become_no_more() -> None:
    counted = Counter(word for _, text in docstrings() for word in AT_MOST if found(word, text))
    assert {word: n for word, n in counted.items() if n > AT_MOST[word]} == {}


def test_openings_that_hide_the_verb_become_no_more() -> None:
    """A first line says what a thing is or does: a noun for a class, an imperative for a function."""
    opened = [place for place, text in docstrings() if text.split(" ", 1)[0] in OPENINGS]
    assert len(opened) <= OPENINGS_AT_MOST


def test_the_rules_can_fail() -> None:
    assert found("set aside", "Series that are set\n    aside.")
    assert not found("said", "an aforesaid rule")


@pytest.mark.parametrize("page", sorted((ROOT / "infra" / "decisions").glob("*.md")), ids=lambda page: page.stem)
def test_a_decision_fits_on_a_page(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_DECISION, "move measurements to infra/docs/results.md"
