"""Slice profiles and the thin-to-thick operator, against closed forms and brute-force integration."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from latentcache import InputError
from pipeline.forward_model import SliceProfile, default_profile, slice_operator
from pipeline.forward_model.slice_profile import cell_edges


def test_a_box_of_five_slices_is_their_mean() -> None:
    operator = slice_operator(SliceProfile("box", 5.0), np.array([2.0, 7.0]), np.arange(10.0))
    expected = np.zeros((2, 10))
    expected[0, :5] = expected[1, 5:] = 0.2
    np.testing.assert_allclose(operator.matrix, expected, atol=1e-12)
    assert operator.covered.all()


def test_a_thick_slice_need_not_sit_on_a_thin_one() -> None:
    operator = slice_operator(SliceProfile("box", 5.0), np.array([4.5]), np.arange(10.0))
    np.testing.assert_allclose(operator.matrix[0, 2:8], [0.1, 0.2, 0.2, 0.2, 0.2, 0.1], atol=1e-12)


@given(
    kind=st.sampled_from(["box", "gaussian"]),
    fwhm=st.floats(1.0, 8.0),
    blur=st.floats(0.0, 4.0),
    shift=st.floats(-2.0, 2.0),
    centre=st.floats(20.0, 30.0),
)
def test_rows_sum_to_one_and_centre_on_the_slice(
    kind: str, fwhm: float, blur: float, shift: float, centre: float
) -> None:
    profile = SliceProfile(kind, fwhm, blur_mm=blur if kind == "box" else 0.0, shift_mm=shift)  # type: ignore[arg-type]
    thin = np.arange(0.0, 50.0, 0.5)
    operator = slice_operator(profile, np.array([centre]), thin)
    assert operator.matrix.sum() == pytest.approx(1.0)
    assert float(operator.matrix[0] @ thin) == pytest.approx(centre + shift, abs=0.02)


def test_a_gaussian_has_the_stated_width_at_half_maximum() -> None:
    profile = SliceProfile("gaussian", 6.0)
    u = np.linspace(-10, 10, 20001)
    density = np.gradient(profile.cumulative(u), u)
    above = u[density >= density.max() / 2]
    assert above[-1] - above[0] == pytest.approx(6.0, abs=0.01)


def test_a_blurred_box_is_the_convolution() -> None:
    u = np.linspace(-15, 15, 6001)
    box = (np.abs(u) <= 2.5).astype(float)
    sigma = 3.0 / (2 * np.sqrt(2 * np.log(2)))
    kernel = np.exp(-0.5 * (u / sigma) ** 2)
    brute = np.convolve(box, kernel, mode="same")
    brute = np.cumsum(brute) / brute.sum()
    ours = SliceProfile("box", 5.0, blur_mm=3.0).cumulative(u)
    assert np.abs(ours - brute).max() < 2e-3


def test_a_measured_profile_reproduces_the_shape_it_samples() -> None:
    offsets = np.linspace(-4, 4, 33)
    profile = SliceProfile.measured(offsets, np.exp(-0.5 * (offsets / 1.5) ** 2))
    assert profile.fwhm_mm == pytest.approx(1.5 * 2.3548, abs=0.05)
    gaussian = SliceProfile("gaussian", 1.5 * 2.3548)
    u = np.linspace(-3, 3, 13)
    np.testing.assert_allclose(profile.cumulative(u), gaussian.cumulative(u), atol=0.01)


def test_slices_that_the_thin_grid_does_not_reach_are_no_measurement() -> None:
    operator = slice_operator(SliceProfile("box", 5.0), np.array([-20.0, 0.0, 5.0]), np.arange(0.0, 20.0))
    assert operator.covered.tolist() == [False, False, True]
    assert np.isfinite(operator.matrix).all()


def test_apply_averages_along_depth_only() -> None:
    thin = np.random.default_rng(0).normal(size=(10, 3, 4)).astype(np.float32)
    out = slice_operator(SliceProfile("box", 5.0), np.array([2.0, 7.0]), np.arange(10.0)).apply(thin)
    np.testing.assert_allclose(out, [thin[:5].mean(0), thin[5:].mean(0)], rtol=1e-5)


def test_cell_edges_of_variable_spacing_lie_half_way() -> None:
    np.testing.assert_allclose(cell_edges(np.array([0.0, 1.0, 3.0])), [-0.5, 0.5, 2.0, 4.0])


def test_the_default_is_the_thickness_and_else_the_spacing() -> None:
    assert default_profile(5.0, 2.5).fwhm_mm == 5.0
    assert default_profile(0.0, 2.5).fwhm_mm == 2.5


@pytest.mark.parametrize(("fwhm", "blur"), [(0.0, 0.0), (-1.0, 0.0), (5.0, -1.0)])
def test_impossible_profiles_are_refused(fwhm: float, blur: float) -> None:
    with pytest.raises(InputError, match="width above 0"):
        SliceProfile("box", fwhm, blur_mm=blur)


def test_a_measured_profile_out_of_order_is_refused() -> None:
    with pytest.raises(InputError, match="ascending"):
        SliceProfile.measured([0.0, -1.0, 1.0], [1.0, 1.0, 1.0])
