"""What an evaluation leaves on disk: a file a case, so that it resumes, and ``metrics.json`` at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentcache.errors import InputError
from pipeline.atomic_file import write_text
from pipeline.evaluate import CaseScores, finite
from pipeline.evaluate_summary import case_of, summarise


def keep_case(path: Path, identity: str, case: CaseScores) -> None:
    """Write one case, whole or not at all. ``identity`` changes with anything that changes its scores."""
    write_text(path, json.dumps(finite({"identity": identity, **asdict(case)}), allow_nan=False))


def finish(folder: Path, cases: Sequence[CaseScores], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``metrics.json``: the facts, means over patients, and every case."""
    document: dict[str, Any] = finite({**facts, **summarise(cases), "by_case": [asdict(case) for case in cases]})
    write_text(folder / "metrics.json", json.dumps(document, indent=1, sort_keys=True, allow_nan=False))
    return document


def load_metrics(folder: Path, split: str) -> dict[str, Any]:
    """The document that ``finish`` wrote.

    Raises:
        InputError: There is none.
    """
    path = folder / "metrics.json"
    if not path.is_file():
        raise InputError(
            f"no evaluation of split {split!r} in this run",
            expected=f"evaluation/{split}/metrics.json",
            remedy=f"Run ctpipe evaluate STORE RUN --split {split} first.",
        )
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def finished_case(path: Path, identity: str) -> CaseScores | None:
    """The case as it was kept, None where there is none of this identity."""
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None  # a case file that is no JSON is done again
    if raw.pop("identity", None) != identity:
        return None
    return case_of(raw)


def log_test_use(run: Path, generation_key: str, pairs: int) -> int:
    """The test split is locked by daylight: every look at it stands in the run. Returns how many there are now."""
    path = run / "test_evaluations.jsonl"
    row = {"time": int(time.time()), "split": "test", "generation_key": generation_key, "pairs": pairs}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return len(path.read_text(encoding="utf-8").splitlines())
