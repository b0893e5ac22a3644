"""Null space of the forward operator A, from thin slices x to thick ones y: where detail can be invented.

Two thin volumes x and x + n with A n = 0 have one thick series. Any method that sees the thick series alone gives one
answer for both, so its errors obey  (|e1|^2 + |e2|^2) / 2 >= |n|^2 / 4  (the parallelogram law). A method below the
bound has seen the truth. And of any answer, only the part in ker A can be invention: how much there is, and how much of
it is true, can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model import SliceOperator
from pipeline.metrics.intensity import check
from pipeline.volume import row_blocks


@dataclass(frozen=True)
class NullSpaceFigures:
    """The part of an answer that the thick series does not determine, beside the truth's.

    Attributes:
        energy_ratio: |N x'|^2 / |N x|^2: 0 adds nothing, 1 as much detail as there is.
        explained: 1 - |N (x' - x)|^2 / |N x|^2: 1 all detail right, 0 no better than adding none, below 0 harmful.
        measured_rmse_hu: RMS of the error's other part, which the thick series does determine.
        null_rmse_hu: RMS of the error in ker A.
    """

    energy_ratio: float
    explained: float
    measured_rmse_hu: float
    null_rmse_hu: float


def null_projector(operator: SliceOperator) -> NDArray[np.float64]:
    """N = I - A^+ A, (n_thin, n_thin), over the covered thick slices."""
    a = operator.matrix[operator.covered]
    return np.asarray(np.eye(a.shape[1]) - np.linalg.pinv(a, rcond=1e-8) @ a)


def null_part(volume: NDArray[Any], operator: SliceOperator) -> NDArray[np.float32]:
    """N x of a volume (z, y, x): what of it no thick slice shows, and an answer can hold and still agree."""
    n = null_projector(operator).astype(np.float32)
    return np.asarray((n @ np.asarray(volume, np.float32).reshape(len(n), -1)).reshape(volume.shape))


def null_space_figures(prediction: NDArray[Any], truth: NDArray[Any], operator: SliceOperator) -> NullSpaceFigures:
    """Split an answer and its error (z, y, x) by what the thick series determines."""
    check(prediction, truth)
    n = null_projector(operator).astype(np.float32)
    own = true = wrong = whole = 0.0
    for rows in row_blocks(truth.shape[1]):
        p = np.ascontiguousarray(prediction[:, rows], dtype=np.float32).reshape(len(n), -1)
        t = np.ascontiguousarray(truth[:, rows], dtype=np.float32).reshape(len(n), -1)
        np_, nt = n @ p, n @ t
        own += float(np.sum(np_**2, dtype=np.float64))
        true += float(np.sum(nt**2, dtype=np.float64))
        wrong += float(np.sum((np_ - nt) ** 2, dtype=np.float64))
        whole += float(np.sum((p - t) ** 2, dtype=np.float64))
    nothing = true < 1e-6 * truth.size
    return NullSpaceFigures(
        float("nan") if nothing else own / true,
        float("nan") if nothing else 1 - wrong / true,
        float(np.sqrt(max(0.0, whole - wrong) / truth.size)),
        float(np.sqrt(wrong / truth.size)),
    )


def twin(truth: NDArray[Any], operator: SliceOperator, rng: np.random.Generator, rms_hu: float) -> NDArray[np.float64]:
    """Another thin volume with the same thick series: the truth plus noise from ker A of RMS ``rms_hu``; float64."""
    n = null_projector(operator)
    noise = (n @ rng.standard_normal((len(n), truth[0].size))).reshape(truth.shape)
    return np.asarray(truth + noise * (rms_hu / np.sqrt(np.mean(noise**2))))


def least_mean_error(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Least possible mean of the two squared errors, in HU^2, for one answer to both volumes: |x1 - x2|^2 / 4."""
    return float(np.mean((first.astype(np.float64) - second) ** 2) / 4)
