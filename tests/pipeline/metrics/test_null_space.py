"""Two volumes with one thick series: what a method adds can be told from what it knows."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.forward_model import SliceOperator, SliceProfile, apply, slice_operator, weights
from pipeline.metrics import null_space_figures
from pipeline.metrics.null_space import least_mean_error, twin

THIN, THICK = np.arange(40.0), np.arange(2.0, 40.0, 5.0)


@pytest.fixture
def operator() -> SliceOperator:
    return slice_operator(SliceProfile("box", 5.0), THICK, THIN)


@pytest.fixture
def truth() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.cumsum(rng.normal(0, 20, (40, 9, 10)), axis=0)


def test_a_twin_has_the_same_thick_series_and_another_truth(operator: SliceOperator, truth: np.ndarray) -> None:
    other = twin(truth, operator, np.random.default_rng(1), 30.0)
    assert operator.matrix @ other.reshape(40, -1) == pytest.approx(operator.matrix @ truth.reshape(40, -1), abs=1e-9)
    assert np.sqrt(np.mean((other - truth) ** 2)) == pytest.approx(30)


@pytest.mark.parametrize("method", ["nearest", "linear", "cubic", "lanczos", "cubic_back_projection"])
def test_no_honest_method_beats_the_bound_and_one_that_saw_the_truth_does(
    operator: SliceOperator, truth: np.ndarray, method: str
) -> None:
    other = twin(truth, operator, np.random.default_rng(2), 30.0)
    bound = least_mean_error(truth, other)
    assert bound == pytest.approx(30**2 / 4)
    answer = apply(weights(method, THICK, THIN, operator.profile), operator.apply(truth))  # type: ignore[arg-type]
    honest = (np.mean((answer - truth) ** 2) + np.mean((answer - other) ** 2)) / 2
    assert honest >= bound
    assert (0 + np.mean((other - other) ** 2)) / 2 < bound, "a method that answers each volume with itself is caught"


def test_figures_split_invention_from_knowledge(operator: SliceOperator, truth: np.ndarray) -> None:
    own = null_space_figures(truth, truth, operator)
    assert (own.energy_ratio, own.explained) == (pytest.approx(1), pytest.approx(1))
    assert own.null_rmse_hu == pytest.approx(0, abs=1e-6)
    invented = null_space_figures(twin(truth, operator, np.random.default_rng(3), 40.0), truth, operator)
    assert invented.measured_rmse_hu == pytest.approx(0, abs=0.05)
    assert invented.null_rmse_hu == pytest.approx(40, rel=1e-3)
    assert invented.explained < 0 < 1 < invented.energy_ratio
    flat = np.full_like(truth, 40.0)
    assert np.isnan(null_space_figures(flat, flat, operator).explained)


def test_an_error_that_the_thick_series_shows_is_not_called_invention(
    operator: SliceOperator, truth: np.ndarray
) -> None:
    found = null_space_figures(truth + 12.0, truth, operator)
    assert found.measured_rmse_hu == pytest.approx(12, rel=0.01)
    assert found.explained == pytest.approx(1, abs=0.01)
