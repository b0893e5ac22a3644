"""Soft projection onto the measurement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.consistency import gain, measurement_noise, project, residual_rms
from pipeline.slice_profile import SliceOperator, SliceProfile, slice_operator

THIN_Z = np.arange(60.0)
THICK_Z = np.arange(2.0, 60.0, 5.0)


def anatomy(seed: int = 0) -> NDArray[np.float32]:
    rough = np.random.default_rng(seed).normal(size=(60, 40, 40))
    return (gaussian_filter(rough, (2.0, 3.0, 3.0)) * 2500).astype(np.float32)


def scene(noise: float) -> tuple[NDArray[np.float32], NDArray[np.float32], SliceOperator]:
    operator = slice_operator(SliceProfile("box", 5.0), THICK_Z, THIN_Z)
    truth = anatomy()
    thick = operator.apply(truth) + np.random.default_rng(1).normal(0, noise, (12, 40, 40)).astype(np.float32)
    return truth, thick, operator


@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_the_residual_comes_down_to_the_noise_and_the_truth_comes_nearer(noise: float) -> None:
    truth, thick, operator = scene(noise)
    guess = (
        truth + gaussian_filter(np.random.default_rng(2).normal(size=truth.shape), (2, 2, 2)).astype(np.float32) * 200
    )
    error_before = float(np.sqrt(np.mean((guess - truth) ** 2)))
    figures = project(guess, thick, operator, THIN_Z, noise_hu=noise)
    after, _ = residual_rms(guess, thick, operator)
    assert figures.rms_before > 1.2 * noise
    assert after == pytest.approx(noise, rel=0.02)
    assert figures.rms_after == pytest.approx(after, rel=1e-3)
    assert float(np.sqrt(np.mean((guess - truth) ** 2))) < 0.9 * error_before


def test_what_agrees_within_the_noise_is_left_alone() -> None:
    truth, thick, operator = scene(5.0)
    untouched = truth.copy()
    figures = project(truth, thick, operator, THIN_Z, noise_hu=5.5)
    np.testing.assert_array_equal(truth, untouched)
    assert figures.change_hu == 0.0
    assert figures.rms_after == figures.rms_before


def test_the_change_reported_is_the_change_made() -> None:
    truth, thick, operator = scene(2.0)
    guess = np.zeros_like(truth)
    figures = project(guess, thick, operator, THIN_Z, noise_hu=2.0)
    assert figures.change_hu == pytest.approx(float(np.sqrt(np.mean(guess**2))), rel=1e-3)


def test_slices_without_coverage_neither_act_nor_count() -> None:
    truth, thick, operator = scene(2.0)
    z = np.concatenate([THICK_Z, [90.0]])
    wild = np.concatenate([thick, np.full((1, 40, 40), 3000, np.float32)])
    wider = slice_operator(SliceProfile("box", 5.0), z, THIN_Z)
    one, other = np.zeros_like(truth), np.zeros_like(truth)
    a = project(one, thick, operator, THIN_Z, noise_hu=2.0)
    b = project(other, wild, wider, THIN_Z, noise_hu=2.0)
    np.testing.assert_allclose(one, other, atol=1e-2)
    assert b.rms_after == pytest.approx(a.rms_after)
    assert np.isnan(b.per_slice_after[-1])


@given(damping=st.floats(1e-4, 10.0))
@settings(max_examples=20, deadline=None)
def test_no_gain_ever_increases_the_residual(damping: float) -> None:
    operator = slice_operator(SliceProfile("gaussian", 6.0), THICK_Z, THIN_Z)
    left = np.eye(12) - operator.matrix @ gain(operator, THIN_Z, damping)
    # On covered slices A S A^T (A S A^T + lambda)^-1 has its eigenvalues in (0, 1).
    kept = left[np.ix_(operator.covered, operator.covered)]
    assert np.abs(np.linalg.eigvals(kept)).max() <= 1.0 + 1e-9


def test_noise_is_measured_on_anatomy_too() -> None:
    rng = np.random.default_rng(3)
    body = gaussian_filter(rng.normal(size=(4, 128, 128)), (0, 6, 6)) * 2000
    assert measurement_noise(body + rng.normal(0, 10, body.shape)) == pytest.approx(10, rel=0.1)
    assert measurement_noise(np.zeros((4, 16, 16), np.int16)) == 1.0
