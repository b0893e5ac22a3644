"""Prose that a newcomer understands: docstrings in the field's vocabulary, decision pages that stay short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("pipeline", "latentcache", "diffusion", "cli")
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
    "lies": "is",
    "its own": "a separate one, or the owner's name",
    "stands": "is, is kept, is recorded, means",
    "told": "given, reported",
    "said": "stated, reported",
}
"""Words of earlier days, and what says it better."""
CODE = re.compile(r"``[^`]*``|^\s*\w+(, \w+)*:", re.MULTILINE)
"""Names in prose, and the arguments and attributes that a docstring lists: ``told`` is a batch's key."""

OPENINGS = ("That", "What", "Which", "Who", "Where", "How")


@cache
def docstrings() -> tuple[tuple[str, str], ...]:
    """(where, text) of every docstring, and of every string that documents a constant, of the library."""
    return tuple(_docstrings())


def _docstrings() -> Iterator[tuple[str, str]]:
    for package in LIBRARY:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    text = node.value.value
                    if isinstance(text, str):
                        yield f"{path.relative_to(ROOT)}:{node.lineno}", text.strip()


def found(word: str, text: str) -> bool:
    return re.search(rf"\b{word}\b", " ".join(CODE.sub(" ", text).split()), re.IGNORECASE) is not None


@pytest.mark.parametrize("word", sorted(REFUSED))
def test_a_word_that_is_gone_stays_away(word: str) -> None:
    where = [place for place, text in docstrings() if found(word, text)]
    assert where == [], f"say {REFUSED[word]!r} instead of {word!r}"


def test_no_first_line_opens_with_a_word_that_hides_the_verb() -> None:
    """A first line says what a thing is or does: a noun for a class, an imperative for a function."""
    assert [place for place, text in docstrings() if text.split(" ", 1)[0] in OPENINGS] == []


def test_the_rules_can_fail() -> None:
    assert found("set aside", "Series that are set\n    aside.")
    assert found("told", "    told: What a model is told.")
    assert not found("said", "an aforesaid rule")
    assert not found(
        "told", "A batch has ``told``.\n\nArgs:\n    told: Positions.\n    operator, told, flips: As above."
    )


@pytest.mark.parametrize("page", sorted((ROOT / "infra" / "decisions").glob("*.md")), ids=lambda page: page.stem)
def test_a_decision_fits_on_a_page(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").count("\n")
    assert lines <= LONGEST_DECISION, "move measurements to infra/docs/results.md"
