"""The report of a run: one offline HTML file with a linked viewer, tables, curves and provenance."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.evaluation import ALARM_STEP, CODE_KNOTS, CODE_KNOTS_HU, SPREAD_STEP_HU, CaseView, label, ordered
from pipeline.report.certificates import certificate_section, judged_cases
from pipeline.report.charts import bar_chart, curves_chart, dot_chart, line_chart
from pipeline.report.images import encode_view
from pipeline.report.page import write_page
from pipeline.report.tables import (
    agreement_table,
    case_table,
    category_table,
    definition_list,
    detail_table,
    lung_table,
    notes,
    summary_table,
    tissue_table,
    volume_table,
)
from pipeline.volume import Window

PAGE_BYTES = 15_000_000
"""A page stays below this: cases that do not fit lose quality first, then stay out of the viewer."""
QUALITIES = (None, 95, 86, 70, 50)
"""Of JPEG; None is lossless, so that a difference of two volumes shows nothing of the coding."""
LOSSLESS_SHARE = 0.3
"""Of a byte a voxel, that noise at least takes: where not even this fits, lossless coding is not tried."""
COMPARED = (
    "nearest", "linear", "cubic", "cubic_back_projection", "cubic_consistent", "regression", "refined", "model",
    "vae_ceiling",
)  # fmt: skip


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
    page = resources.files("pipeline.report").joinpath("templates/run_page.html").read_text(encoding="utf-8")
    fields = {
        "TITLE": html.escape(title),
        "LEAD": html.escape(lead),
        "SUMMARY_TABLE": summary_table(document),
        "CATEGORY_TABLE": category_table(document),
        "DETAIL_TABLE": detail_table(document),
        "MEASURES": _measures(document),
        "CASE_TABLE": case_table(document),
        "NOTES": notes(document),
        "CHARTS": "\n".join(
            f"<figure class=chart tabindex=0>{chart}</figure>" for chart in _charts(document, training)
        ),
        "PROVENANCE": definition_list(provenance or {}),
    }
    used = len(page) + sum(len(text) for text in fields.values())
    fields["VIEWER_JSON"] = _script_json(
        {
            "window": [window.center, window.width],
            "knotsHu": CODE_KNOTS_HU,
            "knots": CODE_KNOTS,
            "spreadStep": SPREAD_STEP_HU,
            "alarmStep": ALARM_STEP,
            "cases": _fitting(views, PAGE_BYTES - used),
        }
    )
    write_page(path, page, fields)


def _measures(document: Mapping[str, Any]) -> str:
    """Return a radiologist's and a physicist's measures, each with its heading; what was not measured has none."""
    parts = (
        ("Agreement with the measured slices", agreement_table(document)),
        ("Certificate by scanner", certificate_section(judged_cases(document))),
        ("HU by tissue", tissue_table(document)),
        ("Lung density", lung_table(document)),
        ("Nodules and vessels", volume_table(document)),
    )
    return "\n".join(f"<h2>{title}</h2>\n{text}" for title, text in parts if text)


def _fitting(views: Sequence[CaseView], room: int) -> list[dict[str, Any]]:
    """Cases at the best quality at which all of them fit; at the least one, as many as the room holds."""
    for quality in QUALITIES:
        if quality is None and sum(view.encoded_voxels for view in views) * LOSSLESS_SHARE > room:
            continue  # would not fit, and compressing it would take long
        cases = [encode_view(view, quality) for view in views]
        sizes = [sum(len(volume["src"]) for volume in case["volumes"]) + 4096 for case in cases]
        if sum(sizes) <= room:
            return cases
    out: list[dict[str, Any]] = []
    for case, size in zip(cases, sizes, strict=True):
        if size <= room:
            out.append(case)
            room -= size
    return out


def _charts(document: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> list[str]:
    methods = {name: document["methods"][name] for name in ordered(document["methods"])}
    phase = document.get("phase", {})
    means = [(label(name), row["psnr_db"]) for name, row in methods.items() if row.get("psnr_db") is not None]
    charts = [bar_chart("PSNR in the window, mean over patients", means, "PSNR (dB)")] if means else []
    spread = [
        (
            label(name),
            [v for v in (c["scores"].get(name, {}).get("psnr_db") for c in document["by_case"]) if v is not None],
        )
        for name in methods
        if name in COMPARED
    ]
    if len(document["by_case"]) > 1:
        rows = [row for row in spread if row[1]]
        charts.append(dot_chart("PSNR in the window, one dot a pair, a bar at the median", rows, "PSNR (dB)"))
    phases = [
        (label(name), [(row["phase"], row["rmse_hu"]) for row in rows])
        for name, rows in ((name, phase.get(name, ())) for name in methods)
        if name in COMPARED and len(rows) > 1
    ]
    if phases:
        charts.append(
            curves_chart(
                "Error by place between thick slices",
                phases,
                "distance to the nearest thick slice, in thick spacings",
                "RMS error (HU)",
            )
        )
    for name, field, unit in (
        ("Training loss", "loss", "loss"),
        ("Validation loss", "val_loss", "loss"),
        ("Validation PSNR in the window", "psnr", "PSNR (dB)"),
    ):
        points = [(float(r["step"]), float(r[field])) for r in training if r.get(field) is not None and "step" in r]
        if len(points) > 1:
            charts.append(line_chart(name, points, unit))
    return charts


def _script_json(value: Any) -> str:
    """JSON that cannot close the script element around it."""
    return json.dumps(value, separators=(",", ":")).replace("</", "<\\/")
