"""The report: one offline HTML file with a linked viewer, tables, curves and provenance."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.hu import Window
from pipeline.report_charts import bar_chart, line_chart
from pipeline.report_views import CODE_KNOTS, CODE_KNOTS_HU, CaseView, encode_view, label


def write_report(
    path: Path,
    *,
    title: str,
    lead: str,
    document: Mapping[str, Any],
    window: Window,
    views: Sequence[CaseView],
    training: Sequence[Mapping[str, Any]] = (),
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write the page, whole or not at all. ``lead`` is its first paragraph, in plain words; ``training`` log rows."""
    page = resources.files("pipeline").joinpath("report_page.html").read_text(encoding="utf-8")
    charts = [bar_chart("PSNR in the window (dB), mean over patients", _psnr_rows(document))]
    charts += [
        line_chart(name, rows)
        for name, rows in (
            ("Training loss", _curve(training, "loss")),
            ("Validation loss", _curve(training, "val_loss")),
            ("Validation PSNR in the window (dB)", _curve(training, "val_psnr_db")),
        )
        if len(rows) > 1
    ]
    fields = {
        "TITLE": html.escape(title),
        "LEAD": html.escape(lead),
        "SUMMARY_TABLE": _summary_table(document),
        "CASE_TABLE": _case_table(document),
        "CHARTS": "\n".join(f"<figure>{chart}</figure>" for chart in charts),
        "PROVENANCE": _definition_list(provenance or {}),
        "VIEWER_JSON": _script_json(
            {
                "window": [window.center, window.width],
                "knotsHu": CODE_KNOTS_HU,
                "knots": CODE_KNOTS,
                "cases": [encode_view(view) for view in views],
            }
        ),
    }
    for name, value in fields.items():
        page = page.replace("{{" + name + "}}", value)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(page, encoding="utf-8")
    draft.replace(path)


def _script_json(value: Any) -> str:
    """JSON that cannot close the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("</", "<\\/")


def _psnr_rows(document: Mapping[str, Any]) -> list[tuple[str, float]]:
    return [
        (label(name), row["psnr_db"]) for name, row in document["methods"].items() if row.get("psnr_db") is not None
    ]


def _curve(log: Sequence[Mapping[str, Any]], field: str) -> list[tuple[float, float]]:
    return [(float(row["step"]), float(row[field])) for row in log if row.get(field) is not None and "step" in row]


def _number(value: Any, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        first, *rest = (html.escape(v) for v in values)
        scope = "col" if tag == "th" else "row"
        return (
            f"<tr><th scope={scope}>{first}</th>"
            + "".join(f"<{tag}{' scope=col' if tag == 'th' else ''}>{v}</{tag}>" for v in rest)
            + "</tr>"
        )

    body = "".join(cells("td", row) for row in rows)
    return (
        f"<div class=scroll tabindex=0><table><caption>{html.escape(caption)}</caption>"
        f"<thead>{cells('th', head)}</thead><tbody>{body}</tbody></table></div>"
    )


def _summary_table(document: Mapping[str, Any]) -> str:
    cubic = document["methods"].get("cubic", {}).get("psnr_db")
    rows = []
    for name, row in document["methods"].items():
        value = row["psnr_db"]
        gain = "" if value is None or cubic is None else f"{value - cubic:+.2f}"
        rows.append([label(name), _number(value, 2), gain, _number(row["ssim"], 4), _number(row["mae_hu"], 2)])
    head = ["Method", "PSNR (dB)", "against cubic (dB)", "SSIM", "MAE (HU)"]
    return _table(head, rows, f"Mean over {document['cases']} held-out patients, inside the window")


def _case_table(document: Mapping[str, Any]) -> str:
    methods = list(document["methods"])
    rows = []
    for case in document["by_case"]:
        scores = [case["scores"].get(m, {}).get("psnr_db") for m in methods]
        residual = case.get("consistency", {}).get("rms_hu")
        rows.append([case["key"], case["category"], *(_number(s, 2) for s in scores), _number(residual, 2)])
    head = ["Pair", "Category", *(label(m) for m in methods), "RMS(Ax-y) (HU)"]
    return _table(head, rows, "PSNR in the window (dB) by case, and the output's misfit to the thick series")


def _definition_list(facts: Mapping[str, Any]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
        + "</dl>"
    )
