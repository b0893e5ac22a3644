"""``ctpipe compare``: two runs on the same held-out patients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    run_a: Annotated[Path, typer.Argument(help="A run that `ctpipe evaluate` has been run on.")],
    run_b: Annotated[Path, typer.Argument(help="Another one, evaluated on the same pairs.")],
    split: Annotated[str, typer.Option(help="The evaluated split.")] = "test",
    as_json: AsJson = False,
) -> int:
    """Paired differences B - A of the models over the patients that both were scored on, with 95% intervals.

    Examples:

        ctpipe compare RUN_A RUN_B

        ctpipe compare RUN_A RUN_B --split val --json
    """
    result = compare_runs(run_a, run_b, split)
    emit(result, _text(result), as_json)
    return Exit.OK


def compare_runs(run_a: Path, run_b: Path, split: str) -> dict[str, Any]:
    """Figures of both runs, their paired differences, and in which settings the runs differ."""
    from dataclasses import asdict

    from latentcache.errors import InputError
    from pipeline.evaluate_files import load_metrics
    from pipeline.evaluate_summary import case_of, values
    from pipeline.statistics_patients import paired_difference

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


def _text(result: dict[str, Any]) -> str:
    lines = [f"{result['common_pairs']} common pairs of split {result['split']}; B - A over patients, 95% interval"]
    for figure, row in result["model"].items():
        d = row["difference"]
        interval = "too few patients" if d["low"] is None else f"{d['low']:+.4f} to {d['high']:+.4f}"
        lines.append(f"  {figure:18s} A {row['a']:9.4f}  B {row['b']:9.4f}  {d['mean']:+.4f} ({interval})")
    for key, (a, b) in {**result["settings_differ"], **result["runs_differ"]}.items():
        lines.append(f"  differs: {key}: {str(a)[:60]} / {str(b)[:60]}")
    if result["only_a"] or result["only_b"]:
        lines.append(f"  left out: {result['only_a']} pairs of A alone, {result['only_b']} of B alone")
    return "\n".join(lines)
