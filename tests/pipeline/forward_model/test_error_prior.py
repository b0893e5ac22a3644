"""An answer of any quality through consistency: never worse than it was by more than the noise."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.decode import ComposeSettings, compose, restore
from pipeline.forward_model import SliceProfile, ThickMeasurement, enforce_data_consistency
from pipeline.forward_model.column_solver import ColumnSolver, hat_correlation
from pipeline.forward_model.data_consistency import DAMPING
from pipeline.forward_model.error_prior import error_prior
from pipeline.metrics import psnr
from pipeline.phantom import make_patient
from pipeline.volume import Geometry, Volume, Window, interpolated

WINDOW = Window(40, 400)
NOISE_HU = 4.0
PROFILES = (SliceProfile("box", 5.0), SliceProfile("box", 4.8, blur_mm=2.8), SliceProfile("gaussian", 6.2))


@functools.cache
def anatomy() -> tuple[NDArray[np.float32], Geometry]:
    """A phantom's middle: chest wall, lung, vessels and spine, noise-free."""
    patient = make_patient(7, 96, 60)
    rows = slice(24, 72)
    hu = np.ascontiguousarray(patient.thin_truth[:, rows])
    at = patient.thin.geometry
    return hu, Geometry(hu.shape, at.affine_lps, at.z_mm, at.thickness_mm)


@functools.cache
def measured(which: int) -> ThickMeasurement:
    """The phantom seen by thick slices of a profile, with noise; the noise asked for is what the truth leaves."""
    truth, target = anatomy()
    z = np.asarray(target.z_mm)
    at = target.with_z(np.arange(z[0] + 2, z[-1] - 1, 5.0), thickness_mm=5.0)
    blank = Volume(np.zeros(at.shape_zyx, np.float32), at)
    seen = ThickMeasurement.of(blank, target.z_mm, PROFILES[which], NOISE_HU)
    noise = np.random.default_rng(which).normal(0, NOISE_HU, at.shape_zyx)
    return ThickMeasurement(
        Volume((seen.operator.apply(truth) + noise).astype(np.float32), at), seen.operator, NOISE_HU
    )


def decibels(hu: NDArray[np.float32]) -> float:
    a, b = (np.clip(v, WINDOW.lower, WINDOW.upper).astype(np.float32) for v in (hu, anatomy()[0]))
    return psnr(a, b, data_range=WINDOW.width)


def answered(decoded: NDArray[np.float32], which: int) -> tuple[float, float]:
    """PSNR inside the window before and after consistency, as compose does both."""
    clipped = np.clip(decoded, WINDOW.lower, WINDOW.upper).astype(np.float32)
    given, made = (
        compose(clipped, WINDOW, measured(which), ComposeSettings("absolute", consistency=on))[0].astype(np.float32)
        for on in (False, True)
    )
    return decibels(given), decibels(made)


def with_error(which: int, kind: str, wanted_db: float) -> NDArray[np.float32]:
    """The truth inside the window plus an error of this size: a share of cubic's, or smooth, or white noise."""
    truth, target = anatomy()
    seen = np.clip(truth, WINDOW.lower, WINDOW.upper)
    if kind == "cubic":
        error = np.clip(interpolated(measured(which).volume, target, "cubic"), WINDOW.lower, WINDOW.upper) - seen
    else:
        error = np.random.default_rng(11).standard_normal(truth.shape).astype(np.float32)
        error = gaussian_filter(error, 1.5) if kind == "smooth" else error
    rms = WINDOW.width * 10 ** (-wanted_db / 20)
    return np.asarray(seen + error * np.float32(rms / np.sqrt(np.mean(np.square(error)))), dtype=np.float32)


@pytest.mark.parametrize("which", range(len(PROFILES)))
def test_the_truth_stays_the_truth(which: int) -> None:
    """Findings M5: what interpolation misses outside the window was paid for inside it, 35 dB from the truth."""
    before, after = answered(anatomy()[0], which)
    assert before > 50
    assert after > 50
    assert after > before - 0.5


@pytest.mark.parametrize("which", range(len(PROFILES)))
@pytest.mark.parametrize("wanted_db", [30.0, 33.0, 36.0])
def test_a_good_answer_loses_nothing(which: int, wanted_db: float) -> None:
    before, after = answered(with_error(which, "cubic", wanted_db), which)
    assert after > before - 0.1


@given(
    which=st.sampled_from(range(len(PROFILES))),
    kind=st.sampled_from(["cubic", "smooth", "white"]),
    inside_db=st.floats(25.0, 60.0),
    outside_hu=st.floats(0.0, 120.0),
)
@settings(max_examples=25, deadline=None)
def test_no_answer_is_made_worse_by_more_than_the_noise(
    which: int, kind: str, inside_db: float, outside_hu: float
) -> None:
    """Errors inside and outside the window alike; what is lost in RMS is a share of the thick slices' noise."""
    seen = measured(which)
    x = with_error(which, kind, inside_db)
    truth = anatomy()[0]
    off = gaussian_filter(np.random.default_rng(5).standard_normal(truth.shape).astype(np.float32), 1.5)
    off *= np.float32(outside_hu / off.std())
    beyond = [(truth <= WINDOW.lower, np.minimum, WINDOW.lower), (truth >= WINDOW.upper, np.maximum, WINDOW.upper)]
    for where, edge, limit in beyond:
        x[where] = edge(truth + off, limit)[where]
    before = WINDOW.width * 10 ** (-decibels(x) / 20)
    figures = enforce_data_consistency(x, seen, window=WINDOW, floor_hu=-1024)
    after = WINDOW.width * 10 ** (-decibels(x) / 20)
    assert after <= before * 1.02 + 0.15 * NOISE_HU
    assert figures.rms_after <= figures.rms_before + 1e-3
    assert x.min() >= -1024


@pytest.mark.parametrize("which", range(len(PROFILES)))
def test_interpolation_gains_as_before(which: int) -> None:
    """Where no network has spoken the prior is alike everywhere, so that nothing of what it earned is lost."""
    target = anatomy()[1]
    cubic = interpolated(measured(which).volume, target, "cubic")
    made, figures = compose(cubic, WINDOW, measured(which), ComposeSettings("absolute"))
    alone = cubic.copy()
    restore(alone, cubic, WINDOW, None)
    enforce_data_consistency(alone, measured(which), floor_hu=-1024)
    np.testing.assert_allclose(made, np.rint(alone), atol=1)
    assert decibels(made.astype(np.float32)) > decibels(cubic) + 0.2
    assert figures["rms_after_hu"] == pytest.approx(NOISE_HU, rel=0.15)


def test_the_residual_tells_how_good_an_answer_is() -> None:
    truth = anatomy()[0]
    inside = [error_prior(with_error(0, "cubic", db), measured(0), WINDOW).inside for db in (26.0, 30.0, 36.0)]
    inside.append(error_prior(truth.copy(), measured(0), WINDOW).inside)
    assert inside == sorted(inside, reverse=True)
    assert inside[0] > 0.03 > 0.005 > inside[-1]


def test_many_columns_at_once_are_each_their_own_solution() -> None:
    """Against a dense solution of every column, for overlapping slices of a wide profile too."""
    rng = np.random.default_rng(0)
    z = np.arange(40.0)
    for profile, spacing in ((PROFILES[0], 5.0), (PROFILES[2], 3.0)):
        at = Geometry((1, 1, 1), ((0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1)), (0.0,), 5.0)
        thick_at = at.with_z(np.arange(4.0, 37.0, spacing))
        blank = Volume(np.zeros((len(thick_at.z_mm), 1, 1), np.float32), thick_at)
        a = ThickMeasurement.of(blank, z, profile, 1.0).operator.matrix
        x = rng.normal(0, 100, (40, 6)).astype(np.float32)
        sigma = rng.uniform(1, 60, x.shape).astype(np.float32)
        wanted = (a @ rng.normal(0, 30, x.shape)).astype(np.float32)
        infinite = np.full_like(x, np.inf)
        made = ColumnSolver(a, z, np.full(len(a), DAMPING)).solve(x, wanted, sigma, -infinite, infinite, 2.0)
        for c in range(6):
            s = sigma[:, c, None] * hat_correlation(z) * sigma[None, :, c]
            m = a @ s @ a.T
            mu = np.linalg.solve(m + np.diag((np.diag(m) + 2.0) * DAMPING + 2.0), wanted[:, c])
            np.testing.assert_allclose(made[:, c] - x[:, c], s @ a.T @ mu, atol=0.1)
