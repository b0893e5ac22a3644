"""Classical methods from thick to thin slices. Each acts along z alone and is one small matrix for all columns."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model.slice_profile import SliceOperator, SliceProfile, slice_operator
from pipeline.volume import ZMethod, z_weights

Baseline = Literal["nearest", "linear", "cubic", "lanczos", "cubic_back_projection"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
ROUNDS = 10
"""Rounds of back-projection: agreement is then to a few percent of the first residual, without amplified noise."""


def back_projection_weights(
    operator: SliceOperator, start: NDArray[np.float64], rounds: int = ROUNDS
) -> NDArray[np.float64]:
    """Matrix (n_thin, n_thick) of ``rounds`` of x <- x + C (y - A x) from x = C y (Irani and Peleg 1991, eq. 1).

    Args:
        operator: A. Rows that the thin grid does not cover correct nothing.
        start: C, (n_thin, n_thick), an interpolation.
    """
    return start + projection(operator, start, rounds) @ (np.eye(start.shape[1]) - operator.matrix @ start)


def projection(
    operator: SliceOperator, interpolation: NDArray[np.float64], rounds: int = ROUNDS
) -> NDArray[np.float64]:
    """Matrix Q (n_thin, n_thick) by which ``rounds`` of x <- x + C (y - A x) are x + Q (y - A x), from any x.

    Since x_n = (I - C A)^n x + sum over i < n of (I - C A)^i C y, that sum is Q, and I - Q A is (I - C A)^n.
    """
    correct = interpolation * operator.covered[None, :]
    total = np.zeros_like(correct)
    for _ in range(rounds):
        total = total + correct - correct @ (operator.matrix @ total)
    return total


def weights(
    method: Baseline, thick_z_mm: NDArray[Any], thin_z_mm: NDArray[Any], profile: SliceProfile
) -> NDArray[np.float64]:
    """Matrix (n_thin, n_thick) of a method; positions in mm, ascending. ``profile`` serves back-projection only."""
    thick, thin = np.asarray(thick_z_mm, dtype=np.float64), np.asarray(thin_z_mm, dtype=np.float64)
    if method == "cubic_back_projection":
        return back_projection_weights(slice_operator(profile, thick, thin), z_weights(thick, thin, "cubic"))
    plain: ZMethod = method
    return z_weights(thick, thin, plain)


def apply(matrix: NDArray[np.float64], thick_hu: NDArray[Any]) -> NDArray[np.float32]:
    """Thin volume (z, y, x) float32 from thick HU, rows of the image in blocks so that memory is the result's."""
    out = np.empty((len(matrix), *thick_hu.shape[1:]), dtype=np.float32)
    m = matrix.astype(np.float32)
    for y in range(0, thick_hu.shape[1], 64):
        part = np.ascontiguousarray(thick_hu[:, y : y + 64], dtype=np.float32)
        out[:, y : y + 64] = (m @ part.reshape(len(part), -1)).reshape(len(m), -1, thick_hu.shape[2])
    return out
