"""From cases to one table: means by patient with intervals, by category, and each method against interpolation.

What counts is the gain over cubic made consistent: what that step gives without any learning is no model's merit.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from latentcache import InputError
from latentcache.storage import write_text
from pipeline.evaluation.case import CaseScores, finite
from pipeline.evaluation.views import label, ordered
from pipeline.metrics import TISSUE_CLASSES_HU, by_patient, interval, paired_difference


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
    """The test split is locked by daylight: every look at it is recorded in the run. Returns how many there are now."""
    path = run / "test_evaluations.jsonl"
    row = {"time": int(time.time()), "split": "test", "generation_key": generation_key, "pairs": pairs}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return len(path.read_text(encoding="utf-8").splitlines())


def summary_text(document: dict[str, Any], folder: Path) -> str:
    """The table that people read."""
    lines = [
        *filter(None, [simulated_note(document)]),
        f"{count_of(document['cases'], 'pair')} of {count_of(document['patients'], 'patient')}, "
        f"split {document['split']}: "
        "PSNR in the window (dB), SSIM, MAE (HU); PSNR against cubic made consistent with its 95% interval over "
        "patients, and SSIM against it",
    ]
    for name in ordered(document["methods"]):
        row = document["methods"][name]
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.2f}"
        ssim = "-" if row["ssim"] is None else f"{row['ssim']:.4f}"
        mae = "-" if row["mae_hu"] is None else f"{row['mae_hu']:.2f}"
        gain = document["against_consistent"].get(name, {})
        similar = f"{gain['ssim']['mean']:+.4f}" if gain.get("ssim") else ""
        compared = f"{interval_text(gain.get('psnr_db'))}  {similar}"
        lines.append(f"  {label(name):42s} {psnr:>7s}  {ssim:>6s}  {mae:>7s}  {compared}".rstrip())
    lines += [f"  not scored {key}: {'; '.join(why.values())}" for key, why in document["failures"].items()]
    if document.get("not_encoded"):
        lines.append(f"  not encoded, so not evaluated: {', '.join(document['not_encoded'])}")
    lines.append(f"written to {folder / 'metrics.json'}")
    return "\n".join(lines)


def simulated_note(document: Mapping[str, Any]) -> str:
    """Warn of figures on simulated thick series; empty where all were scanned."""
    if not document.get("simulated_pairs"):
        return ""
    return (
        "Simulated: every thick series here was computed from its thin one, by `ctpipe ingest --simulate-thick`. "
        "What a scanner's own thick slices would give is not shown."
    )


def interval_text(interval: Mapping[str, Any] | None) -> str:
    """A mean and its interval, e.g. ``+0.52 (+0.31 to +0.70)``; empty where there is none."""
    if interval is None:
        return ""
    if interval["low"] is None:
        return f"{interval['mean']:+.2f} (too few patients for an interval)"
    return f"{interval['mean']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})"


def number(value: Any, digits: int) -> str:
    """A figure, or that it was not measured."""
    return "not measured" if value is None else f"{value:.{digits}f}"


def count_of(number: int, noun: str) -> str:
    """``1 patient``, ``3 patients``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


FIGURES: dict[str, tuple[str, ...]] = {
    "psnr_db": ("psnr_db",),
    "ssim": ("ssim",),
    "mae_hu": ("mae_hu",),
    "psnr_3072_db": ("psnr_3072_db",),
    "ssim_3d": ("ssim_3d",),
    "ms_ssim": ("ms_ssim", "value"),
    "edge_width_mm": ("sharpness_z", "width_mm"),
    "edge_excess_mm": ("sharpness_z", "excess_mm"),
    "mtf50_per_mm": ("sharpness_z", "mtf50_per_mm"),
    "noise_hu": ("noise", "prediction", "std_hu"),
    "noise_ratio": ("noise", "ratio", "std_hu"),
    "noise_frequency_per_mm": ("noise", "prediction", "mean_frequency_per_mm"),
    "roughness_ratio": ("slice_to_slice", "roughness_ratio"),
    "jitter_hu": ("slice_to_slice", "jitter_hu"),
    "invented_energy": ("null_space", "energy_ratio"),
    "detail_explained": ("null_space", "explained"),
    "laa950": ("lung", "laa950"),
    "pd15_hu": ("lung", "pd15_hu"),
    "consistency_rms_hu": ("consistency", "rms_hu"),
    "consistency_truth_rms_hu": ("consistency", "truth_rms_hu"),
    "consistency_ratio": ("consistency", "ratio"),
    "perceptual_axial": ("perceptual", "axial"),
    "perceptual_coronal": ("perceptual", "coronal"),
    **{
        f"{kind}_{figure}": ("volumetry", kind, figure)
        for kind in ("nodule", "vessel")
        for figure in ("count", "missed", "total_error", "mean_absolute_error")
    },
    **{f"{kind}_truth_total_error": ("volumetry", "truth", kind, "total_error") for kind in ("nodule", "vessel")},
    **{
        f"{tissue}_{figure}": ("bias", tissue, figure)
        for tissue in TISSUE_CLASSES_HU
        for figure in ("bias_hu", "mae_hu")
    },
}
"""Figures of a case that are averaged, and where they stand in its scores."""
REFERENCE, CONSISTENT = "cubic", "cubic_consistent"


def summarise(cases: Iterable[CaseScores]) -> dict[str, Any]:
    """Means over patients by method; infinite PSNR (identical volumes) is counted apart, failures are listed.

    ``methods`` has the means, ``intervals`` 95% bootstrap intervals over patients, ``against_cubic`` paired differences
    in PSNR, ``against_consistent`` those in PSNR and SSIM from cubic made consistent, ``by_category`` the same a
    category.
    """
    cases = list(cases)
    names = list(dict.fromkeys(name for case in cases for name in case.scores))
    categories = sorted({case.category for case in cases})
    return {
        "cases": len(cases),
        "patients": len({_patient(case) for case in cases}),
        "methods": {name: _means(cases, name) for name in names},
        "intervals": {name: _intervals(cases, name) for name in names},
        "against_cubic": _against(cases, names),
        "against_consistent": _against_consistent(cases, names),
        "by_category": {
            category: {
                "cases": len(chosen),
                "methods": {name: _means(chosen, name) for name in names},
                "against_cubic": _against(chosen, names),
                "against_consistent": _against_consistent(chosen, names),
            }
            for category in categories
            for chosen in [[case for case in cases if case.category == category]]
        },
        "phase": {name: _phases(cases, name) for name in names},
        "failures": {case.key: case.failures for case in cases if case.failures},
        "notes": {case.key: list(case.notes) for case in cases if case.notes},
    }


def case_of(row: Mapping[str, Any]) -> CaseScores:
    """A case as it was, from its JSON."""
    return CaseScores(**{**row, "notes": tuple(row.get("notes", ()))})


def values(cases: Sequence[CaseScores], method: str, figure: str) -> dict[str, float]:
    """A figure of a method by patient; cases without it (failed, identical, not measured) are left out."""
    rows = []
    for case in cases:
        value = _look_up(case.scores.get(method), FIGURES[figure])
        if value is not None and np.isfinite(value):
            rows.append((_patient(case), float(value)))
    return by_patient(rows)


def _patient(case: CaseScores) -> str:
    return case.patient or case.key


def _look_up(value: Any, path: Sequence[str]) -> float | None:
    for name in path:
        if not isinstance(value, dict) or value.get(name) is None:
            return None
        value = value[name]
    return float(value)


def _means(cases: Sequence[CaseScores], name: str) -> dict[str, Any]:
    rows = [case.scores[name] for case in cases if name in case.scores]
    out: dict[str, Any] = {}
    for figure in FIGURES:
        found = values(cases, name, figure)
        if found or figure in ("psnr_db", "ssim", "mae_hu"):
            out[figure] = float(np.mean(list(found.values()))) if found else None
    return {**out, "cases": len(rows), "identical": sum(bool(row["identical"]) for row in rows)}


def _intervals(cases: Sequence[CaseScores], name: str) -> dict[str, Any]:
    found = {figure: values(cases, name, figure) for figure in ("psnr_db", "ssim", "mae_hu")}
    return {figure: asdict(interval(rows)) for figure, rows in found.items() if rows}


def _against(
    cases: Sequence[CaseScores], names: Sequence[str], whom: str = REFERENCE, figure: str = "psnr_db"
) -> dict[str, Any]:
    """Every method's paired difference from one of them."""
    reference = values(cases, whom, figure)
    out = {}
    for name in names:
        own = values(cases, name, figure)
        if name != whom and own.keys() & reference.keys():
            out[name] = asdict(paired_difference(own, reference))
    return out


def _against_consistent(cases: Sequence[CaseScores], names: Sequence[str]) -> dict[str, Any]:
    each = {figure: _against(cases, names, CONSISTENT, figure) for figure in ("psnr_db", "ssim")}
    return {
        name: {figure: rows[name] for figure, rows in each.items() if name in rows}
        for name in names
        if name in each["psnr_db"]
    }


def _phases(cases: Sequence[CaseScores], name: str) -> list[dict[str, float]]:
    """RMS error by phase over all cases, weighted by slices."""
    rows = [row for case in cases for row in case.scores.get(name, {}).get("phase", ())]
    out = []
    for low in np.arange(0, 0.5, 0.1):
        inside = [r for r in rows if low <= r["phase"] < low + 0.1 or (low > 0.35 and r["phase"] == 0.5)]
        if inside:
            n = np.array([r["slices"] for r in inside], dtype=float)
            phase = float(np.average([r["phase"] for r in inside], weights=n))
            rmse = float(np.sqrt(np.average([r["rmse_hu"] ** 2 for r in inside], weights=n)))
            out.append({"phase": phase, "rmse_hu": rmse, "slices": int(n.sum())})
    return out
