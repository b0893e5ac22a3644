"""Tables of the report as HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report_views import label, ordered

DETAIL_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("psnr_3072_db", "PSNR over 3072 HU (dB)", 2),
    ("ssim_3d", "3-D SSIM", 4),
    ("ms_ssim", "MS-SSIM", 4),
    ("edge_width_mm", "Edge width along z (mm)", 2),
    ("edge_excess_mm", "wider than the truth's (mm)", 2),
    ("mtf50_per_mm", "MTF 50% (1/mm)", 3),
    ("noise_hu", "Noise (HU)", 1),
    ("roughness_ratio", "Roughness along z (truth = 1)", 2),
    ("jitter_hu", "Slice-to-slice jitter (HU)", 2),
    ("invented_energy", "Detail added (truth = 1)", 2),
    ("detail_explained", "Detail right (truth = 1)", 2),
    ("laa950", "LAA-950 (share of lung)", 3),
)


def number(value: Any, digits: int) -> str:
    """A figure, or that it was not measured."""
    return "not measured" if value is None else f"{value:.{digits}f}"


def with_interval(row: Mapping[str, Any] | None, digits: int = 2) -> str:
    """A paired difference with its interval."""
    if row is None:
        return ""
    if row["low"] is None:
        return f"{row['mean']:+.{digits}f}"
    return f"{row['mean']:+.{digits}f} ({row['low']:+.{digits}f} to {row['high']:+.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """A table whose first column names the row; it scrolls sideways in itself on narrow screens."""
    first, *rest = (html.escape(v) for v in head)
    top = f"<tr><th scope=col>{first}</th>" + "".join(f"<th scope=col>{v}</th>" for v in rest) + "</tr>"
    body = ""
    for row in rows:
        name, *values = (html.escape(v) for v in row)
        body += f"<tr><th scope=row>{name}</th>" + "".join(f"<td>{v}</td>" for v in values) + "</tr>"
    title = html.escape(caption)
    return (
        f'<div class=scroll tabindex=0 role=region aria-label="{title}"><table><caption>{title}</caption>'
        f"<thead>{top}</thead><tbody>{body}</tbody></table></div>"
    )


def summary_table(document: Mapping[str, Any]) -> str:
    """Every method: means and the paired difference from cubic."""
    against = document.get("against_cubic", {})
    rows = []
    for name in ordered(document["methods"]):
        row = document["methods"][name]
        gain = with_interval(against.get(name))
        rows.append([label(name), number(row["psnr_db"], 2), gain, number(row["ssim"], 4), number(row["mae_hu"], 2)])
    head = ["Method", "PSNR (dB)", "against cubic (dB)", "SSIM", "MAE (HU)"]
    patients = document.get("patients", document["cases"])
    caption = (
        f"Mean over {patients} held-out patients, inside the window; in brackets the 95% bootstrap interval "
        "of the paired difference over patients"
    )
    return table(head, rows, caption)


def detail_table(document: Mapping[str, Any]) -> str:
    """The further figures; columns that no method has are left out."""
    methods = document["methods"]
    rows_of = [(name, methods[name]) for name in ordered(methods)]
    columns = [c for c in DETAIL_COLUMNS if any(row.get(c[0]) is not None for row in methods.values())]
    rows = [[label(n), *(number(row.get(key), digits) for key, _, digits in columns)] for n, row in rows_of]
    caption = (
        "Detail is what the thick series cannot determine: added says how much there is of it, right how much of the "
        "truth's it explains (below 0 it does harm)"
    )
    return table(["Method", *(title for _, title, _ in columns)], rows, caption)


def category_table(document: Mapping[str, Any]) -> str:
    """PSNR by category of patients."""
    categories = document.get("by_category", {})
    methods = ordered(document["methods"])
    rows = []
    for name, part in categories.items():
        found = [part["methods"].get(m, {}).get("psnr_db") for m in methods]
        gain = with_interval(part["against_cubic"].get("model"))
        rows.append([name, str(part["cases"]), gain, *(number(v, 2) for v in found)])
    head = ["Category", "Pairs", "Model against cubic (dB)", *(label(m) for m in methods)]
    return table(head, rows, "PSNR in the window (dB) by category")


def case_table(document: Mapping[str, Any]) -> str:
    """PSNR of every case, and the output's misfit."""
    methods = ordered(document["methods"])
    rows = []
    for case in document["by_case"]:
        scores = ["identical" if row.get("identical") else number(row.get("psnr_db"), 2)
                  for row in (case["scores"].get(m, {}) for m in methods)]  # fmt: skip
        residual = case.get("consistency", {}).get("rms_hu")
        rows.append([case["key"], case["category"], *scores, number(residual, 2)])
    head = ["Pair", "Category", *(label(m) for m in methods), "RMS(Ax-y) (HU)"]
    return table(head, rows, "PSNR in the window (dB) by case, and the output's misfit to the thick series")


def notes(document: Mapping[str, Any]) -> str:
    """What went wrong or is peculiar, by case."""
    lines = [f"{key}: {label(m)}: {why}" for key, found in document["failures"].items() for m, why in found.items()]
    lines += [f"{key}: {note}" for key, found in document.get("notes", {}).items() for note in found]
    if not lines:
        return ""
    return "<ul class=note>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def definition_list(facts: Mapping[str, Any]) -> str:
    """Names and values."""
    return (
        "<dl>"
        + "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts.items())
        + "</dl>"
    )
