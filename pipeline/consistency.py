"""Agreement with what was measured: re-averaging the thin slices must reproduce the thick ones within their noise.

x: thin slices, y: thick slices, A: slice operator. A hard constraint A x = y would carry every error of A into the
image, so the update is the linear-Gaussian one,

    x + K (y - A x),    K = S A^T (A S A^T + lambda I)^-1

with S a smooth covariance along z for the error of x. K depends on positions alone: one small matrix for all columns.
lambda is chosen by the discrepancy principle (Morozov 1966): the smallest change that brings the residual down to the
noise; an output already within the noise is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.slice_profile import SliceOperator

ROW_BLOCK = 32
"""Image rows worked on at a time, to bound memory."""
NOISE_TILE = 8
"""Side of the tiles in which noise is measured, in 2x2 blocks."""
PRIOR_LENGTH_MM = 1.5
"""Correlation length along z of the error of x: about one thin slice, so that corrections do not ring."""


@dataclass(frozen=True)
class ProjectionFigures:
    """Evidence of one projection, all in HU; arrays are (n_thick,), NaN for slices that the thin grid does not cover.

    Attributes:
        rms_before: RMS(A x - y) before.
        rms_after: RMS(A x - y) after.
        noise_hu: The residual aimed for.
        change_hu: RMS of the change made to x.
    """

    rms_before: float
    rms_after: float
    per_slice_before: tuple[float, ...]
    per_slice_after: tuple[float, ...]
    noise_hu: float
    change_hu: float


def row_blocks(n_rows: int) -> Iterator[slice]:
    """Slices over image rows, ``ROW_BLOCK`` at a time."""
    for start in range(0, n_rows, ROW_BLOCK):
        yield slice(start, min(start + ROW_BLOCK, n_rows))


def residual_covariance(thin: NDArray[Any], thick: NDArray[Any], operator: SliceOperator) -> NDArray[np.float64]:
    """Mean over columns of r r^T for r = y - A x: (n_thick, n_thick) in HU squared."""
    a = operator.matrix.astype(np.float32)
    total = np.zeros((len(a), len(a)))
    for rows in row_blocks(thin.shape[1]):
        r = _columns(thick[:, rows]) - a @ _columns(thin[:, rows])
        total += r @ r.T
    return np.asarray(total / (thin.shape[1] * thin.shape[2]))


def residual_rms(thin: NDArray[Any], thick: NDArray[Any], operator: SliceOperator) -> tuple[float, NDArray[np.float64]]:
    """RMS(A x - y) in HU over all covered slices, and per thick slice (NaN where not covered).

    Args:
        thin: (n_thin, y, x) HU.
        thick: (n_thick, y, x) HU.
    """
    return _rms(residual_covariance(thin, thick, operator), operator.covered)


def measurement_noise(thick: NDArray[Any]) -> float:
    """Noise of the thick slices in HU, from the in-plane second difference of each 2x2 block, where anatomy is even.

    (a - b - c + d) / 2 has the variance of one pixel for white noise and vanishes on planes; its median absolute
    deviation is taken a tile, and the median over the body's tiles, so that edges count little (after Donoho's
    estimator on the finest diagonal detail). CT noise is correlated in-plane, so this is a lower bound; it is floored
    at 1 HU, the step of the stored values.
    """
    side = 2 * NOISE_TILE
    rows, columns = (n // side for n in thick.shape[1:])
    even = thick[:, : max(rows * side, 2), : max(columns * side, 2)].astype(np.float32)
    detail = np.abs(even[:, ::2, ::2] - even[:, ::2, 1::2] - even[:, 1::2, ::2] + even[:, 1::2, 1::2]) / 2
    if rows == 0 or columns == 0:
        return max(1.0, float(np.median(detail) / 0.6745))
    tiles = detail.reshape(len(thick), rows, NOISE_TILE, columns, NOISE_TILE)
    spread = np.median(tiles, axis=(2, 4)) / 0.6745
    level = even.reshape(len(thick), rows, side, columns, side).mean(axis=(2, 4))
    inside = level > -300
    return max(1.0, float(np.median(spread[inside] if inside.any() else spread)))


def gain(operator: SliceOperator, thin_z_mm: NDArray[Any], damping: float) -> NDArray[np.float64]:
    """K (n_thin, n_thick) for lambda = ``damping``; columns of uncovered slices are zero."""
    z = np.asarray(thin_z_mm, dtype=np.float64)
    prior = np.exp(-np.abs(z[:, None] - z[None, :]) / PRIOR_LENGTH_MM)
    a = operator.matrix[operator.covered]
    inner = a @ prior @ a.T + damping * np.eye(len(a))
    k = np.zeros((len(z), len(operator.matrix)))
    k[:, operator.covered] = np.linalg.solve(inner, a @ prior).T
    return k


def project(
    thin: NDArray[np.float32],
    thick: NDArray[Any],
    operator: SliceOperator,
    thin_z_mm: NDArray[Any],
    *,
    noise_hu: float,
) -> ProjectionFigures:
    """Bring ``thin`` (n_thin, y, x) float32 HU, in place, into agreement with ``thick`` within ``noise_hu``."""
    covariance = residual_covariance(thin, thick, operator)
    before, per_before = _rms(covariance, operator.covered)
    k = _choose_gain(operator, thin_z_mm, covariance, noise_hu)
    if k is None:
        slices = tuple(float(v) for v in per_before)
        return ProjectionFigures(before, before, slices, slices, noise_hu, 0.0)
    a32, k32 = operator.matrix.astype(np.float32), k.astype(np.float32)
    for rows in row_blocks(thin.shape[1]):
        x = _columns(thin[:, rows])
        x += k32 @ (_columns(thick[:, rows]) - a32 @ x)
        thin[:, rows] = x.reshape(len(x), -1, thin.shape[2])
    after, per_after = _rms(_left_over(operator, k, covariance), operator.covered)
    change = float(np.sqrt(np.trace(k @ covariance @ k.T) / len(k)))
    return ProjectionFigures(
        before,
        after,
        tuple(float(v) for v in per_before),
        tuple(float(v) for v in per_after),
        noise_hu,
        change,
    )


def _choose_gain(
    operator: SliceOperator, thin_z_mm: NDArray[Any], covariance: NDArray[np.float64], noise_hu: float
) -> NDArray[np.float64] | None:
    """The most damped gain whose residual is within the noise, by bisection; None when there is nothing to do."""
    if not operator.covered.any() or _rms(covariance, operator.covered)[0] <= noise_hu:
        return None
    low, high = -6.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        k = gain(operator, thin_z_mm, 10.0**middle)
        if _rms(_left_over(operator, k, covariance), operator.covered)[0] > noise_hu:
            high = middle
        else:
            low = middle
    return gain(operator, thin_z_mm, 10.0**low)


def _left_over(operator: SliceOperator, k: NDArray[np.float64], covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    remains = np.eye(len(covariance)) - operator.matrix @ k
    return np.asarray(remains @ covariance @ remains.T)


def _rms(covariance: NDArray[np.float64], covered: NDArray[np.bool_]) -> tuple[float, NDArray[np.float64]]:
    per_slice = np.where(covered, np.sqrt(np.maximum(np.diag(covariance), 0.0)), np.nan)
    overall = float(np.sqrt(np.mean(per_slice[covered] ** 2))) if covered.any() else float("nan")
    return overall, per_slice


def _columns(volume: NDArray[Any]) -> NDArray[np.float32]:
    return np.ascontiguousarray(volume, dtype=np.float32).reshape(len(volume), -1)
