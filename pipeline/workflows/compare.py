"""Compare two runs that were evaluated on the same pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def compare_runs(run_a: Path, run_b: Path, split: str) -> dict[str, Any]:
    """Figures of both runs, their paired differences, and in which settings the runs differ."""
    from dataclasses import asdict

    from latentcache import InputError
    from pipeline.evaluation import case_of, load_metrics, values
    from pipeline.metrics import paired_difference

    documents = [load_metrics(run / "evaluation" / split, split) for run in (run_a, run_b)]
    first, second = ({row["key"]: case_of(row) for row in document["by_case"]} for document in documents)
    if documents[0]["window_hu"] != documents[1]["window_hu"]:
        raise InputError(
            f"windows {documents[0]['window_hu']} and {documents[1]['window_hu']} HU",
            expected="one window: a PSNR over another range is another figure",
            remedy="Compare runs on stores encoded with one window.",
        )
    common = sorted(first.keys() & second.keys())
    if not common:
        raise InputError(
            "no pair that both runs were scored on", expected="the same store", remedy="Evaluate both on one store."
        )
    rows: dict[str, Any] = {}
    for figure in ("psnr_db", "ssim", "mae_hu", "edge_width_mm", "invented_energy", "detail_explained"):
        a, b = (values([cases[key] for key in common], "model", figure) for cases in (first, second))
        if a.keys() & b.keys():
            rows[figure] = {
                "a": sum(a.values()) / len(a),
                "b": sum(b.values()) / len(b),
                "difference": asdict(paired_difference(b, a)),
            }
    return {
        "split": split,
        "common_pairs": len(common),
        "only_a": len(first) - len(common),
        "only_b": len(second) - len(common),
        "window_hu": documents[0]["window_hu"],
        "model": rows,
        "settings_differ": _differences(documents[0]["settings"], documents[1]["settings"]),
        "runs_differ": _differences(_run_card(run_a), _run_card(run_b)),
    }


def _run_card(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return card


def _differences(a: Any, b: Any, name: str = "") -> dict[str, list[Any]]:
    """Leaves that differ, by dotted name, as [a, b]."""
    if isinstance(a, dict) and isinstance(b, dict):
        out: dict[str, list[Any]] = {}
        for key in sorted(a.keys() | b.keys()):
            out |= _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
        return out
    return {} if a == b else {name: [a, b]}
