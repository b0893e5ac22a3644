"""Restoring what the window clipped, and composing with the measurement."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from latentcache import NonFiniteError
from pipeline.decode import ComposeSettings, compose
from pipeline.decode.compose import agreement
from pipeline.forward_model import SliceProfile, slice_operator
from pipeline.volume import Geometry, Volume, Window, blend_at_edges, interpolated

WINDOW = Window(40, 400)
PLAIN = ComposeSettings()


def lattice(n: int, spacing: float, first: float, thickness: float = 5.0, size: int = 24) -> Geometry:
    affine = ((0.0, 0.0, 0.7, -8.0), (0.0, 0.7, 0.0, -8.0), (spacing, 0.0, 0.0, first), (0.0, 0.0, 0.0, 1.0))
    return Geometry((n, size, size), affine, tuple(first + spacing * np.arange(n)), thickness)


def chest(n: int, size: int = 24) -> NDArray[np.float32]:
    """Lung, soft tissue and bone with soft borders: all three sides of the window."""
    rng = np.random.default_rng(4)
    field = gaussian_filter(rng.normal(size=(n, size, size)), (3, 3, 3))
    field /= field.std()
    return np.asarray(np.interp(field, [-3, -0.5, 0.2, 1.0, 3.0], [-950, -850, 20, 80, 1200]), dtype=np.float32)


@pytest.fixture(scope="module")
def case() -> tuple[NDArray[np.float32], Volume, Geometry]:
    target = lattice(60, 1.0, 0.0)
    thick_at = lattice(12, 5.0, 2.0)
    truth = chest(60)
    hu = slice_operator(SliceProfile("box", 5.0), np.asarray(thick_at.z_mm), np.asarray(target.z_mm)).apply(truth)
    hu += np.random.default_rng(5).normal(0, 4, hu.shape).astype(np.float32)
    return truth, Volume(np.rint(hu).astype(np.int16), thick_at), target


def test_the_full_range_comes_back(case: tuple[NDArray[np.float32], Volume, Geometry]) -> None:
    truth, thick, target = case
    decoded = np.clip(truth, WINDOW.lower, WINDOW.upper)
    hu, figures = compose(decoded, WINDOW, PLAIN.measured(thick, target))
    for outside in (truth < -800, truth > 600):
        assert outside.sum() > 500
        assert abs(float(np.mean(hu[outside] - truth[outside]))) < 60
        assert np.abs(decoded[outside] - truth[outside]).mean() > 300
    assert 0.3 < figures["restored_fraction"] < 0.9


def test_deep_inside_the_window_nothing_changes() -> None:
    decoded = np.random.default_rng(0).uniform(-50, 130, (4, 5, 6)).astype(np.float32)
    base = np.random.default_rng(1).uniform(-150, 230, (4, 5, 6)).astype(np.float32)
    np.testing.assert_array_equal(blend_at_edges(decoded, base, WINDOW), decoded)


@given(base=st.floats(-1024, 3000), start=st.floats(-200, 270))
@settings(max_examples=200, deadline=None)
def test_no_step_in_the_decoded_value(base: float, start: float) -> None:
    decoded = (start + np.linspace(0, 10, 101)).astype(np.float32).reshape(-1, 1, 1)
    out = blend_at_edges(decoded, np.full_like(decoded, base), WINDOW)[:, 0, 0]
    assert np.diff(out).min() > -1e-2, "monotone"
    assert np.abs(np.diff(out)).max() < 2.5, "0.1 HU in, no jump out"


@given(decoded=st.floats(-170, 250), start=st.floats(-1024, 2900))
@settings(max_examples=200, deadline=None)
def test_no_step_in_the_interpolated_value(decoded: float, start: float) -> None:
    base = (start + np.linspace(0, 10, 101)).astype(np.float32).reshape(-1, 1, 1)
    out = blend_at_edges(np.full_like(base, decoded), base, WINDOW)[:, 0, 0]
    assert np.abs(np.diff(out)).max() < 0.5


def test_noise_of_the_decoder_leaves_no_salt_in_the_lung() -> None:
    base = np.full((4, 20, 20), -850, np.float32)
    noisy = (WINDOW.lower + np.abs(np.random.default_rng(0).normal(0, 15, base.shape))).astype(np.float32)
    out = blend_at_edges(noisy, base, WINDOW)
    assert np.abs(out - base).mean() < 40
    vessel = blend_at_edges(np.full_like(base, 40), base, WINDOW)
    np.testing.assert_array_equal(vessel, np.full_like(base, 40))


def test_a_clipped_voxel_never_takes_a_value_from_inside_the_window() -> None:
    at_edge = np.full((1, 1, 1), WINDOW.lower, np.float32)
    assert blend_at_edges(at_edge, np.full_like(at_edge, 100), WINDOW)[0, 0, 0] == WINDOW.lower


def test_consistency_is_reported_and_improves(case: tuple[NDArray[np.float32], Volume, Geometry]) -> None:
    truth, thick, target = case
    blur = gaussian_filter(np.clip(truth, WINDOW.lower, WINDOW.upper), (2.5, 0, 0))
    plain, without = compose(blur, WINDOW, PLAIN.measured(thick, target), ComposeSettings(consistency=False))
    better, figures = compose(blur, WINDOW, ComposeSettings(noise_hu=4.0).measured(thick, target))
    assert "rms_after_hu" not in without
    assert figures["rms_after_hu"] < figures["rms_before_hu"]
    assert figures["rms_after_hu"] < 6.0, "near the noise, though air may not go below its floor"
    assert np.mean((better - truth) ** 2) < 0.95 * np.mean((plain - truth) ** 2)
    checked = agreement(better, PLAIN.measured(thick, target))
    assert checked["rms_after_hu"] == pytest.approx(figures["rms_after_hu"], abs=0.1)
    assert len(figures["per_slice_after_hu"]) == 12


def test_residual_detail_cancels_an_error_that_both_decodes_share(
    case: tuple[NDArray[np.float32], Volume, Geometry],
) -> None:
    truth, thick, target = case
    base = interpolated(thick, target, "cubic")
    error = gaussian_filter(np.random.default_rng(8).normal(size=truth.shape), 1.0).astype(np.float32) * 150
    settings = ComposeSettings(detail="residual", consistency=False)
    clean, _ = compose(truth, WINDOW, PLAIN.measured(thick, target), settings, condition_hu=base)
    inside = (np.abs(truth - 40) < 120) & (np.abs(base - 40) < 120) & (np.abs(error) < 60)
    shared, _ = compose(truth + error, WINDOW, PLAIN.measured(thick, target), settings, condition_hu=base + error)
    absolute, _ = compose(truth + error, WINDOW, PLAIN.measured(thick, target), ComposeSettings(consistency=False))
    assert np.abs(shared[inside] - clean[inside]).mean() < 2
    assert np.abs(absolute[inside] - truth[inside]).mean() > 10


def test_a_share_of_the_change_is_a_share_of_the_way_from_what_it_starts_from(
    case: tuple[NDArray[np.float32], Volume, Geometry],
) -> None:
    truth, thick, target = case
    base = interpolated(thick, target, "cubic")
    written = {}
    for gain in (0.0, 0.5, 1.0):
        settings = ComposeSettings(consistency=False, change_gain=gain)
        hu, figures = compose(truth, WINDOW, PLAIN.measured(thick, target), settings, condition_hu=base)
        written[gain] = hu.astype(np.float64)
        assert figures.get("change_gain", 1.0) == gain
    inside = (np.abs(truth - 40) < 120) & (np.abs(base - 40) < 120)
    assert np.abs(written[0.0] - base)[inside].max() <= 0.5
    assert np.abs(written[0.5] - (written[0.0] + written[1.0]) / 2)[inside].max() <= 1
    assert np.abs(written[1.0] - truth)[inside].mean() < 1


def test_interpolation_never_leaves_the_measured_range(case: tuple[NDArray[np.float32], Volume, Geometry]) -> None:
    _, thick, target = case
    base = interpolated(thick, target, "cubic")
    assert (base >= thick.hu.min(axis=0)).all()
    assert (base <= thick.hu.max(axis=0)).all()


def test_a_nan_is_named_not_cast_to_ordinary_hu(case: tuple[NDArray[np.float32], Volume, Geometry]) -> None:
    truth, thick, target = case
    broken = truth.copy()
    broken[3, 4, 5] = np.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity in the decoded volume"):
        compose(broken, WINDOW, PLAIN.measured(thick, target))
