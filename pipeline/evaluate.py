"""Evaluate one held-out pair: every method on the thin grid, inside the extent that the thick series covers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache.errors import InputError
from pipeline import metrics
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.resample import ZMethod, resample_z
from pipeline.volume import Volume

BASELINES: tuple[ZMethod, ...] = ("nearest", "linear", "cubic", "lanczos")


@dataclass(frozen=True)
class CaseScores:
    """Scores of one pair. ``scores[method]`` has psnr_db and ssim in the window, mae_hu there, and bias by tissue.

    Identical volumes have no PSNR: ``psnr_db`` is None and ``identical`` true. A method that could not be scored stands
    in ``failures`` with its reason and never in a mean.
    """

    key: str
    category: str
    slices: int
    scores: dict[str, dict[str, Any]]
    failures: dict[str, str]
    consistency: dict[str, Any]


def common_slices(thick: Geometry, thin: Geometry) -> slice:
    """Thin slices whose centres lie inside the thick series' scanned extent.

    Raises:
        InputError: When there are fewer than two.
    """
    low, high = thick.extent_mm
    inside = np.flatnonzero((np.array(thin.z_mm) >= low) & (np.array(thin.z_mm) <= high))
    if len(inside) < 2:
        raise InputError(
            f"{len(inside)} thin slices inside the thick extent", expected="at least 2", remedy="Exclude this pair."
        )
    return slice(int(inside[0]), int(inside[-1]) + 1)


def interpolations(thick: Volume, thin: Geometry) -> dict[str, NDArray[np.float32]]:
    """The classical methods on the thin grid, in HU."""
    source, target = np.array(thick.geometry.z_mm), np.array(thin.z_mm)
    return {method: resample_z(thick.hu, source, target, method) for method in BASELINES}


def score(
    key: str,
    category: str,
    truth: NDArray[Any],
    methods: Mapping[str, NDArray[Any]],
    window: Window,
    consistency: Mapping[str, Any] | None = None,
) -> CaseScores:
    """Score volumes (z, y, x) in HU against the truth, inside the window (both clipped; data range = width)."""
    scores: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    clipped_truth = np.clip(truth.astype(np.float32), window.lower, window.upper)
    for name, volume in methods.items():
        try:
            clipped = np.clip(volume.astype(np.float32), window.lower, window.upper)
            value = metrics.psnr(clipped, clipped_truth, data_range=window.width)
            scores[name] = {
                "psnr_db": value if math.isfinite(value) else None,
                "identical": not math.isfinite(value),
                "ssim": metrics.ssim(clipped, clipped_truth, data_range=window.width),
                "mae_hu": metrics.mean_absolute_error(clipped, clipped_truth),
                "bias": metrics.bias_by_tissue(clipped, clipped_truth),
            }
        except InputError as error:
            failures[name] = str(error)
    return CaseScores(key, category, len(truth), scores, failures, dict(consistency or {}))


def summarise(cases: Iterable[CaseScores]) -> dict[str, Any]:
    """Mean over patients by method, with the number of cases; infinite PSNR (identical volumes) is counted apart."""
    cases = list(cases)
    out: dict[str, Any] = {"cases": len(cases), "methods": {}, "failures": {}}
    names = dict.fromkeys(name for case in cases for name in case.scores)
    for name in names:
        rows = [case.scores[name] for case in cases if name in case.scores]
        finite = [row["psnr_db"] for row in rows if not row["identical"]]
        out["methods"][name] = {
            "psnr_db": float(np.mean(finite)) if finite else None,
            "ssim": float(np.mean([row["ssim"] for row in rows])),
            "mae_hu": float(np.mean([row["mae_hu"] for row in rows])),
            "cases": len(rows),
            "identical": len(rows) - len(finite),
        }
    out["failures"] = {case.key: case.failures for case in cases if case.failures}
    return out
