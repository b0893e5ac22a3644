"""Classical methods as matrices: back-projection agrees with the thick series, the others are what they are named."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.forward_model import BASELINES, SliceProfile, apply, slice_operator, weights
from pipeline.forward_model.upsampling import back_projection_weights
from pipeline.volume import resample_z, z_weights

THIN, THICK = np.arange(60.0), np.arange(2.0, 60.0, 5.0)
BOX = SliceProfile("box", 5.0)


@pytest.mark.parametrize("method", BASELINES)
def test_every_method_keeps_a_constant(method: str) -> None:
    assert weights(method, THICK, THIN, BOX).sum(axis=1) == pytest.approx(np.ones(60))  # type: ignore[arg-type]


def test_interpolations_are_those_of_resample() -> None:
    thick = np.random.default_rng(0).normal(0, 100, (12, 70, 5)).astype(np.float32)
    for method in ("nearest", "linear", "cubic", "lanczos"):
        expected = resample_z(thick, THICK, THIN, method)  # type: ignore[arg-type]
        assert apply(weights(method, THICK, THIN, BOX), thick) == pytest.approx(expected, abs=1e-3)  # type: ignore[arg-type]


def test_back_projection_brings_the_residual_down_and_the_truth_nearer() -> None:
    operator = slice_operator(BOX, THICK, THIN)
    rng = np.random.default_rng(1)
    truth = np.cumsum(rng.normal(0, 30, (60, 6, 7)), axis=0)
    thick = operator.apply(truth)
    cubic = apply(weights("cubic", THICK, THIN, BOX), thick)
    back = apply(weights("cubic_back_projection", THICK, THIN, BOX), thick)

    def misfit(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((operator.apply(x) - thick) ** 2)))

    assert misfit(back) < 0.05 * misfit(cubic)
    assert np.mean((back - truth) ** 2) < np.mean((cubic - truth) ** 2)


def test_an_uncovered_thick_slice_corrects_nothing() -> None:
    thick = np.append(THICK, 200.0)
    operator = slice_operator(BOX, thick, THIN)
    start = z_weights(thick, THIN, "cubic")
    assert not operator.covered[-1]
    # One round adds (C masked) (I - A C): no column of C that belongs to the uncovered slice takes part.
    step = back_projection_weights(operator, start, 1) - start
    masked = start.copy()
    masked[:, -1] = 0
    assert step == pytest.approx(masked @ (np.eye(len(thick)) - operator.matrix @ start))
