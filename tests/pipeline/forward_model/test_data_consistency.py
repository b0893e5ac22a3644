"""Soft projection onto the measurement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.forward_model import (
    SliceOperator,
    SliceProfile,
    ThickMeasurement,
    enforce_data_consistency,
    measurement_noise,
    residual_rms,
    slice_operator,
)
from pipeline.volume import Geometry, Volume

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


def measurement(thick: NDArray[np.float32], operator: SliceOperator, noise_hu: float) -> ThickMeasurement:
    z = operator.thick_z_mm
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (5.0, 0.0, 0.0, float(z[0])), (0.0, 0.0, 0.0, 1.0))
    n, rows, columns = thick.shape
    return ThickMeasurement(Volume(thick, Geometry((n, rows, columns), affine, tuple(z), 5.0)), operator, noise_hu)


@pytest.mark.parametrize("noise", [2.0, 8.0])
def test_the_residual_comes_down_to_the_noise_and_the_truth_comes_nearer(noise: float) -> None:
    truth, thick, operator = scene(noise)
    guess = (
        truth + gaussian_filter(np.random.default_rng(2).normal(size=truth.shape), (2, 2, 2)).astype(np.float32) * 200
    )
    error_before = float(np.sqrt(np.mean((guess - truth) ** 2)))
    figures = enforce_data_consistency(guess, measurement(thick, operator, noise))
    after, _ = residual_rms(guess, thick, operator)
    assert figures.rms_before > 1.2 * noise
    assert after == pytest.approx(noise, rel=0.1)
    assert figures.rms_after == pytest.approx(after, rel=1e-3)
    assert float(np.sqrt(np.mean((guess - truth) ** 2))) < 0.9 * error_before


def test_what_agrees_within_the_noise_is_left_alone() -> None:
    truth, thick, operator = scene(5.0)
    untouched = truth.copy()
    figures = enforce_data_consistency(truth, measurement(thick, operator, 5.5))
    np.testing.assert_array_equal(truth, untouched)
    assert figures.change_hu == 0.0
    assert figures.rms_after == figures.rms_before


def test_the_change_reported_is_the_change_made() -> None:
    truth, thick, operator = scene(2.0)
    guess = np.zeros_like(truth)
    figures = enforce_data_consistency(guess, measurement(thick, operator, 2.0))
    assert figures.change_hu == pytest.approx(float(np.sqrt(np.mean(guess**2))), rel=1e-3)


def test_slices_without_coverage_neither_act_nor_count() -> None:
    truth, thick, operator = scene(2.0)
    z = np.concatenate([THICK_Z, [90.0]])
    wild = np.concatenate([thick, np.full((1, 40, 40), 3000, np.float32)])
    wider = slice_operator(SliceProfile("box", 5.0), z, THIN_Z)
    one, other = np.zeros_like(truth), np.zeros_like(truth)
    a = enforce_data_consistency(one, measurement(thick, operator, 2.0))
    b = enforce_data_consistency(other, measurement(wild, wider, 2.0))
    np.testing.assert_allclose(one, other, atol=1e-2)
    assert b.rms_after == pytest.approx(a.rms_after)
    assert np.isnan(b.per_slice_after[-1])


@given(noise=st.floats(0.5, 40.0), width=st.floats(4.0, 8.0), floor=st.sampled_from([-np.inf, -300.0]))
@settings(max_examples=15, deadline=None)
def test_the_residual_never_grows_and_nothing_falls_below_the_floor(noise: float, width: float, floor: float) -> None:
    truth = np.maximum(anatomy()[:, :12, :12], floor)
    operator = slice_operator(SliceProfile("gaussian", width), THICK_Z, THIN_Z)
    guess = np.maximum(gaussian_filter(truth, (2.5, 0, 0)), floor)
    figures = enforce_data_consistency(guess, measurement(operator.apply(truth), operator, noise), floor_hu=floor)
    assert figures.rms_after <= figures.rms_before + 1e-3
    assert figures.rms_after <= max(1.15 * noise, 0.1 * figures.rms_before)
    assert guess.min() >= floor


def test_a_bone_is_met_as_closely_as_the_rest() -> None:
    truth = np.zeros((60, 4, 4), np.float32)
    truth[30:38, 1:3, 1:3] = 1000.0
    operator = slice_operator(SliceProfile("box", 5.0), THICK_Z, THIN_Z)
    thick = operator.apply(truth) + np.random.default_rng(0).normal(0, 5, (12, 4, 4)).astype(np.float32)
    guess = np.zeros_like(truth)
    figures = enforce_data_consistency(guess, measurement(thick, operator, 5.0))
    assert figures.rms_after == pytest.approx(5.0, rel=0.1)
    bone = np.abs(operator.apply(guess) - thick)[:, 1:3, 1:3]
    assert bone.max() < 25, "a quadratic penalty leaves a share of 1000 HU"


def test_the_floor_and_the_measurement_hold_together() -> None:
    """Clipping at the floor afterwards undoes the agreement; asked for together, both hold."""
    truth = np.full((60, 4, 4), -1000.0, np.float32)
    truth[24:40] = 50.0
    operator = slice_operator(SliceProfile("gaussian", 4.4), THICK_Z, THIN_Z)
    thick = operator.apply(truth)
    guess = gaussian_filter(truth, (3.0, 0, 0))
    clipped, together = guess.copy(), guess.copy()
    enforce_data_consistency(clipped, measurement(thick, operator, 2.0))
    np.maximum(clipped, -1000.0, out=clipped)
    figures = enforce_data_consistency(together, measurement(thick, operator, 2.0), floor_hu=-1000.0)
    assert clipped.min() == together.min() == -1000.0
    assert residual_rms(clipped, thick, operator)[0] > 2 * figures.rms_after
    assert figures.rms_after == pytest.approx(2.0, rel=0.2)
    assert np.mean((together - truth) ** 2) < np.mean((clipped - truth) ** 2)


def test_an_end_slice_that_reaches_beyond_the_grid_is_not_judged_by() -> None:
    truth, _, _ = scene(1.0)
    wide = slice_operator(SliceProfile("gaussian", 6.7), THICK_Z, THIN_Z)
    assert wide.covered.all()
    assert wide.judged.tolist() == [False, *[True] * 10, False]
    thick = wide.apply(truth)
    thick[0] += 300
    overall, per_slice = residual_rms(truth, thick, wide)
    assert overall < 0.01
    assert per_slice[0] == pytest.approx(300, rel=1e-3)
    guess = truth.copy()
    enforce_data_consistency(guess, measurement(thick, wide, 0.001))
    assert np.abs(guess - truth).max() < 150, "it acts, but less than a slice that is wholly covered"


def test_noise_is_measured_on_anatomy_too() -> None:
    rng = np.random.default_rng(3)
    body = gaussian_filter(rng.normal(size=(4, 128, 128)), (0, 6, 6)) * 2000
    assert measurement_noise(body + rng.normal(0, 10, body.shape)) == pytest.approx(10, rel=0.1)
    assert measurement_noise(np.zeros((4, 16, 16), np.int16)) == 1.0
