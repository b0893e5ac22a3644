"""The demonstration's folder and figures; its steps are commands, which the command line runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def demo_figures(run: Path, shown: Sequence[str], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the demonstration's result from the metrics of its evaluated run.

    Args:
        run: The run's folder, evaluated on the split ``test``.
        shown: Methods whose PSNR (dB) and SSIM are listed by name.
        seconds: Time of each step, and the ``total``.
    """
    document = json.loads((run / "evaluation" / "test" / "metrics.json").read_text(encoding="utf-8"))
    methods = document["methods"]
    return {
        "psnr_db": {name: methods[name]["psnr_db"] for name in shown},
        "ssim": {name: methods[name]["ssim"] for name in shown},
        "gain_over_consistent_db": methods["model"]["psnr_db"] - methods["cubic_consistent"]["psnr_db"],
        "gain_over_consistent_ssim": methods["model"]["ssim"] - methods["cubic_consistent"]["ssim"],
        "gain_over_cubic_db": methods["model"]["psnr_db"] - methods["cubic"]["psnr_db"],
        "gain_over_linear_db": methods["model"]["psnr_db"] - methods["linear"]["psnr_db"],
        "held_out_pairs": document["cases"],
        "window_hu": document["window_hu"],
        "seconds": seconds,
        "peak_rss_gib": peak_rss_gib(),
        "methods": methods,
    }


def claim_folder(out: Path) -> None:
    """Start afresh in a folder that is empty or that a demo filled; never touch anyone else's files."""
    from latentcache import InputError

    mark = out / ".ctpipe-demo"
    if out.exists() and any(out.iterdir()):
        if not mark.is_file():
            raise InputError(
                f"the folder {out}, which is not empty", expected="an empty folder", remedy="Name another, e.g. demo-2."
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


def peak_rss_gib() -> float:
    """Return the largest resident memory of this process so far, GiB."""
    from latentcache import peak_bytes

    return round(peak_bytes() / 2**30, 2)
