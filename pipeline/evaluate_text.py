"""An evaluation as the table that people read in a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.report_tables import count_of
from pipeline.report_views import label, ordered


def summary_text(document: dict[str, Any], folder: Path) -> str:
    """The table that people read."""
    lines = [
        f"{count_of(document['cases'], 'pair')} of {count_of(document['patients'], 'patient')}, "
        f"split {document['split']}: "
        "PSNR in the window (dB), SSIM, MAE (HU); PSNR against cubic with its 95% interval over patients"
    ]
    for name in ordered(document["methods"]):
        row = document["methods"][name]
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.2f}"
        ssim = "-" if row["ssim"] is None else f"{row['ssim']:.4f}"
        mae = "-" if row["mae_hu"] is None else f"{row['mae_hu']:.2f}"
        gain = document["against_cubic"].get(name)
        lines.append(f"  {label(name):42s} {psnr:>7s}  {ssim:>6s}  {mae:>7s}  {interval_text(gain)}".rstrip())
    lines += [f"  not scored {key}: {'; '.join(why.values())}" for key, why in document["failures"].items()]
    if document.get("not_encoded"):
        lines.append(f"  not encoded, so not evaluated: {', '.join(document['not_encoded'])}")
    lines.append(f"written to {folder / 'metrics.json'}")
    return "\n".join(lines)


def interval_text(interval: Mapping[str, Any] | None) -> str:
    """A mean and its interval, e.g. ``+0.52 (+0.31 to +0.70)``; empty where there is none."""
    if interval is None:
        return ""
    if interval["low"] is None:
        return f"{interval['mean']:+.2f} (too few patients for an interval)"
    return f"{interval['mean']:+.2f} ({interval['low']:+.2f} to {interval['high']:+.2f})"
