"""``ctpipe compare``: two runs on the same held-out patients."""

from __future__ import annotations

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
    from pipeline.workflows import compare_runs

    result = compare_runs(run_a, run_b, split)
    emit(result, _text(result), as_json)
    return Exit.OK


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
