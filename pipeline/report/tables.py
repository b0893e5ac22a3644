"""Tables of the report as HTML."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation import count_of, label, number, ordered
from pipeline.metrics import TISSUE_CLASSES_HU

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
    ("perceptual_axial", "Perceptual distance, axial", 3),
    ("perceptual_coronal", "Perceptual distance, coronal", 3),
)
LUNG_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("laa950", "LAA-950 (share of lung)", 3),
    ("pd15_hu", "Perc15 (HU)", 0),
)
AGREEMENT_COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("consistency_rms_hu", "RMS(Ax-y) (HU)", 2),
    ("consistency_truth_rms_hu", "the true thin series' own (HU)", 2),
    ("consistency_ratio", "Ratio (truth = 1)", 2),
)
SHORT_LABELS = {
    "nearest": "Nearest",
    "linear": "Linear",
    "cubic": "Cubic",
    "lanczos": "Lanczos",
    "cubic_back_projection": "Back-projected",
    "cubic_consistent": "Cubic, consistent",
    "condition_round_trip": "VAE of linear",
    "vae_ceiling": "VAE of truth",
}
"""Labels for tables in which every method is a column."""
VOLUME_COLUMNS: tuple[tuple[str, str], ...] = (
    ("total_error", "error of the summed volume"),
    ("mean_absolute_error", "mean absolute error"),
    ("missed", "missed, mean a patient"),
)


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
        f'<div class=scroll tabindex=0 role=region aria-label="{title}"><table><caption><span>{title}</span></caption>'
        f"<thead>{top}</thead><tbody>{body}</tbody></table></div>"
    )


SPLIT_NAMES = {
    "test": "the test split, which no choice during training saw",
    "val": "the validation split, which training looked at to choose a checkpoint",
    "train": "the training split, which the model has learnt from",
}


def split_name(document: Mapping[str, Any]) -> str:
    """Return the evaluated split in words; the reader must know whether the model could have seen it."""
    split = str(document.get("split", "unknown"))
    return SPLIT_NAMES.get(split, f"the split {split!r}")


def summary_table(document: Mapping[str, Any]) -> str:
    """Every method: means and the paired differences from cubic made consistent, and from plain cubic."""
    against = document.get("against_cubic", {})
    consistent = document.get("against_consistent", {})
    rows = []
    for name in ordered(document["methods"]):
        row = document["methods"][name]
        gains = [with_interval(found) for found in (consistent.get(name, {}).get("psnr_db"), against.get(name))]
        cells = [number(row["psnr_db"], 2), number(row["ssim"], 4), *gains, number(row["mae_hu"], 2)]
        rows.append([label(name), *cells])
    head = ["Method", "PSNR (dB)", "SSIM", "against cubic made consistent (dB)", "against cubic (dB)", "MAE (HU)"]
    patients = count_of(document.get("patients", document["cases"]), "patient")
    caption = (
        f"Mean over {patients} of {split_name(document)}; inside the window; in brackets the 95% bootstrap interval "
        "of the paired difference over patients"
    )
    return table(head, rows, caption)


def _figures_table(document: Mapping[str, Any], wanted: Sequence[tuple[str, str, int]], caption: str) -> str:
    """One row a method; columns and rows in which nothing was measured are left out, and so is an empty table."""
    methods = document["methods"]
    columns = [c for c in wanted if any(row.get(c[0]) is not None for row in methods.values())]
    named = [name for name in ordered(methods) if any(methods[name].get(c[0]) is not None for c in columns)]
    rows = [[label(name), *(number(methods[name].get(key), digits) for key, _, digits in columns)] for name in named]
    return table(["Method", *(title for _, title, _ in columns)], rows, caption) if rows else ""


def detail_table(document: Mapping[str, Any]) -> str:
    """Similarity, sharpness, noise and invention."""
    caption = (
        "Detail is what the thick series cannot determine: added says how much there is of it, right how much of the "
        "truth's it explains (below 0 it does harm)"
    )
    return _figures_table(document, DETAIL_COLUMNS, caption)


def agreement_table(document: Mapping[str, Any]) -> str:
    """Return a table of how well the output, averaged to thick slices, reproduces the measured ones."""
    caption = (
        "Agreement with the measured thick slices y: the output x averaged over the slice profile A. The true thin "
        "series does not agree perfectly either, because both carry noise"
    )
    return _figures_table(document, AGREEMENT_COLUMNS, caption)


def tissue_table(document: Mapping[str, Any]) -> str:
    """Signed and absolute error by tissue of the truth."""
    columns = [
        (f"{tissue}_{figure}", f"{tissue.replace('_', ' ')}, {said}", 1)
        for tissue in TISSUE_CLASSES_HU
        for figure, said in (("bias_hu", "bias"), ("mae_hu", "mean absolute"))
    ]
    low, high = document["window_hu"]
    caption = f"Error in HU by tissue of the true series, both clipped to {low:g} to {high:g} HU"
    return _figures_table(document, columns, caption)


def lung_table(document: Mapping[str, Any]) -> str:
    """Lung densitometry, where the window holds lung."""
    return _figures_table(document, LUNG_COLUMNS, "Lung density in the true series' lung mask")


def volume_table(document: Mapping[str, Any]) -> str:
    """Volumetry of nodules and vessels whose volume is known; empty for patients."""
    methods = document["methods"]
    head: list[str] = []
    cells: dict[str, list[str]] = {}
    said: list[str] = []
    for kind in ("nodule", "vessel"):
        rows = {name: row for name, row in methods.items() if row.get(f"{kind}_count") is not None}
        if not rows:
            continue
        first = next(iter(rows.values()))
        own = first.get(f"{kind}_truth_total_error")
        said.append(f"{kind}s in the true thin series measure {own:+.0%}" if own is not None else "")
        head += [f"{kind.capitalize()}s: {title}" for _, title in VOLUME_COLUMNS]
        for name in ordered(rows):
            total, absolute, missed = (rows[name][f"{kind}_{figure}"] for figure, _ in VOLUME_COLUMNS)
            of = rows[name][f"{kind}_count"]
            cells.setdefault(name, []).extend([f"{total:+.0%}", f"{absolute:.0%}", f"{missed:.1f} of {of:.1f}"])
    if not cells:
        return ""
    caption = "Volumes at the half level against those that the phantom was built with; " + ", ".join(
        filter(None, said)
    )
    return table(["Method", *head], [[label(name), *row] for name, row in cells.items()], caption)


def category_table(document: Mapping[str, Any]) -> str:
    """PSNR by category of patients: a column a category, since there are fewer of them than methods."""
    categories = document.get("by_category", {})
    rows = [
        [label(m), *(number(part["methods"].get(m, {}).get("psnr_db"), 2) for part in categories.values())]
        for m in ordered(document["methods"])
    ]
    gains = [with_interval(part["against_cubic"].get("model")) for part in categories.values()]
    rows.append(["ctpipe model against cubic (dB)", *gains])
    head = ["Method", *(f"{name} ({count_of(part['cases'], 'pair')})" for name, part in categories.items())]
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
    head = ["Pair", "Category", *(SHORT_LABELS.get(m, label(m)) for m in methods), "RMS(Ax-y) (HU)"]
    return table(head, rows, "PSNR in the window (dB) by case, and the output's misfit to the thick series")


def notes(document: Mapping[str, Any]) -> str:
    """Return what went wrong or is peculiar, by case."""
    lines = [f"{key}: {label(m)}: {why}" for key, found in document["failures"].items() for m, why in found.items()]
    lines += [f"{key}: {note}" for key, found in document.get("notes", {}).items() for note in found]
    if not lines:
        return ""
    return "<ul class=note>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def definition_list(facts: Mapping[str, Any]) -> str:
    """Names and values; a value that is a mapping is spelled out."""
    rows = ((str(k), spelled(v) if isinstance(v, Mapping) else str(v)) for k, v in facts.items())
    return "<dl>" + "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in rows) + "</dl>"


def spelled(facts: Mapping[str, Any]) -> str:
    """Settings in a line for people: ``detail residual, consistency yes``. What was left at its default is left out."""
    parts = []
    for key, value in facts.items():
        name = str(key).replace("_", " ")
        if isinstance(value, Mapping):
            inner = spelled(value)
            parts += [f"{name} ({inner})"] if inner else []
        elif value is not None and value != "":
            parts.append(f"{name} {('no', 'yes')[value] if isinstance(value, bool) else value}")
    return ", ".join(parts)
