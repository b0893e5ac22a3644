"""Statistics by patient: a patient with two pairs counts once, and methods are compared within patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError

RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A mean over patients with its bootstrap interval. ``low`` and ``high`` are None for fewer than 3 patients."""

    mean: float
    low: float | None
    high: float | None
    patients: int


def by_patient(values: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean by patient of (patient, value) rows.

    Raises:
        InputError: A value that is not finite: it belongs among the failures, not into a mean.
    """
    groups: dict[str, list[float]] = {}
    for patient, value in values:
        if not np.isfinite(value):
            raise InputError(
                f"the value {value} of one patient", expected="finite values", remedy="Count it as a failure instead."
            )
        groups.setdefault(patient, []).append(value)
    return {patient: float(np.mean(rows)) for patient, rows in groups.items()}


def interval(
    values: Mapping[str, float], *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over patients and its percentile bootstrap interval (Efron and Tibshirani 1993, section 13.3).

    Patients are drawn in the order of their keys, so that the same data give the same interval.

    Raises:
        InputError: No patient.
    """
    if not values:
        raise InputError("no patient", expected="at least one", remedy="Evaluate more pairs.")
    x = np.array([values[key] for key in sorted(values)], dtype=np.float64)
    if len(x) < 3:
        return Interval(float(x.mean()), None, None, len(x))
    means = _means(x, resamples, seed)
    tail = 100 * (1 - level) / 2
    low, high = (float(v) for v in np.percentile(means, [tail, 100 - tail]))
    return Interval(float(x.mean()), low, high, len(x))


def paired_difference(
    first: Mapping[str, float], second: Mapping[str, float], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interval of first - second over the patients that both have."""
    common = first.keys() & second.keys()
    return interval({k: first[k] - second[k] for k in common}, resamples=resamples, seed=seed)


def _means(x: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 2_000_000 // len(x))
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        means[start : start + count] = x[rng.integers(0, len(x), (count, len(x)))].mean(axis=1)
    return means
