"""The table of findings names tests that exist, and covers every id."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.odd_cases import CASES

PAGE = Path("infra/docs/findings.md")
NAMES = re.compile(r"`((?:[a-z_0-9]+/)*test_[a-z_0-9]+\.py)?(?:::(test_[a-z_0-9]+))?(?:\[([^\]`]+)\])?`")


def named(text: str) -> list[tuple[str, str, str]]:
    """(file, test, case) of every test that a page names; one without a file is of the file named before it."""
    found, last = [], ""
    for match in NAMES.finditer(text):
        last = match.group(1) or last
        found.append((last, match.group(2) or "", match.group(3) or ""))
    return found


def test_every_test_that_the_page_names_exists(repo_root: Path) -> None:
    tests = named((repo_root / PAGE).read_text())
    assert len(tests) > 60
    for file, test, case in tests:
        path = repo_root / "tests" / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(), f"{file}::{test}"
        assert not case or any(case.removeprefix("..., ") in odd.name for odd in CASES), case


@pytest.mark.parametrize("letter_and_last", [("D", 14), ("M", 19), ("U", 9)])
def test_every_finding_has_a_row(letter_and_last: tuple[str, int], repo_root: Path) -> None:
    letter, last = letter_and_last
    rows = re.findall(rf"^\| {letter}(\d+) \|", (repo_root / PAGE).read_text(), re.MULTILINE)
    assert list(map(int, rows)) == list(range(1, last + 1))
