"""Fitting a slice profile on a pair, and noticing a wrong one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.forward_model import SliceProfile, check_operator, fit_profile, slice_operator
from pipeline.volume import resample_z

THIN_Z = np.arange(80.0)
THICK_Z = np.arange(2.0, 80.0, 5.0)


@pytest.fixture(scope="module")
def truth() -> NDArray[np.float32]:
    rough = np.random.default_rng(0).normal(size=(80, 32, 32))
    return np.asarray(gaussian_filter(rough, (1.2, 2, 2)) * 3000, dtype=np.float32)


def measured(truth: NDArray[np.float32], profile: SliceProfile) -> NDArray[np.float32]:
    thick = slice_operator(profile, THICK_Z, THIN_Z).apply(truth)
    return thick + np.random.default_rng(1).normal(0, 3, thick.shape).astype(np.float32)


@pytest.mark.parametrize(
    "profile",
    [SliceProfile("box", 5.0), SliceProfile("gaussian", 6.5), SliceProfile("box", 5.5, blur_mm=2.0)],
    ids=str,
)
def test_the_true_profile_is_found(truth: NDArray[np.float32], profile: SliceProfile) -> None:
    found, rms = fit_profile(truth, measured(truth, profile), THICK_Z, THIN_Z, 5.0)
    assert (found.kind, found.fwhm_mm, found.blur_mm) == (
        profile.kind,
        pytest.approx(profile.fwhm_mm, abs=0.01),
        profile.blur_mm,
    )
    assert rms == pytest.approx(3.0, rel=0.05)


def test_a_shift_is_found(truth: NDArray[np.float32]) -> None:
    thick = measured(truth, SliceProfile("box", 5.0, shift_mm=2.0))
    found, rms = fit_profile(truth, thick, THICK_Z, THIN_Z, 5.0, fit_shift=True)
    assert found.shift_mm == pytest.approx(2.0)
    assert rms == pytest.approx(3.0, rel=0.05)


def test_the_right_profile_is_not_accused(truth: NDArray[np.float32]) -> None:
    profile = SliceProfile("box", 5.0)
    check = check_operator(truth, measured(truth, profile), THICK_Z, THIN_Z, profile, 3.0)
    assert (check.verdict, check.message) == ("agrees", "")


@pytest.mark.parametrize(
    ("real", "verdict"),
    [
        (SliceProfile("box", 5.0, shift_mm=2.0), "shifted"),
        (SliceProfile("gaussian", 7.5), "wider"),
        (SliceProfile("box", 3.0), "narrower-or-smoothed"),
    ],
    ids=str,
)
def test_a_wrong_profile_is_detected_and_said(truth: NDArray[np.float32], real: SliceProfile, verdict: str) -> None:
    assumed = SliceProfile("box", 5.0)
    check = check_operator(truth, measured(truth, real), THICK_Z, THIN_Z, assumed, 3.0)
    assert check.suspect
    assert check.verdict == verdict
    assert "explains the thick slices better" in check.message
    assert check.rms_best < 0.85 * check.rms_assumed


def test_an_output_too_smooth_is_said_to_be_that_or_a_narrower_profile(truth: NDArray[np.float32]) -> None:
    assumed = SliceProfile("box", 5.0)
    thick = measured(truth, assumed)
    smooth = resample_z(thick, THICK_Z, THIN_Z, "linear")
    check = check_operator(smooth, thick, THICK_Z, THIN_Z, assumed, 3.0)
    assert check.verdict == "narrower-or-smoothed"
    assert "smoother than life" in check.message
