"""A slice operator fitted on other data, on a genuine thick and thin pair of one acquisition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.archive import open_archive
from pipeline.decode import ComposeSettings, compose
from pipeline.forward_model import ProtocolFit, SliceProfile, check_operator, fit_pair, residual_rms, slice_operator
from pipeline.forward_model.fit import combined
from pipeline.phantom import make_patient
from pipeline.reading import read_scanned, scan
from pipeline.volume import Volume, Window, interpolated

WINDOW = Window(40, 400)


def psnr(hu: NDArray[Any], truth: NDArray[Any]) -> float:
    a, b = (np.clip(v.astype(np.float32), WINDOW.lower, WINDOW.upper) for v in (hu, truth))
    return float(10 * np.log10(WINDOW.width**2 / np.mean((a - b) ** 2)))


def half(volume: Volume, upper: bool) -> Volume:
    """The lower or upper half of the slices, on every other row and column to spare time."""
    n = len(volume.hu) // 2
    slices = slice(n, None) if upper else slice(0, n)
    hu = np.ascontiguousarray(volume.hu[slices, ::2, ::2])
    at = volume.geometry.with_z(np.asarray(volume.geometry.z_mm)[slices])
    return replace(volume, hu=hu, geometry=replace(at, shape_zyx=hu.shape))


@pytest.fixture(scope="module")
def pair(real_data: Path) -> tuple[Volume, Volume]:
    source = open_archive(real_data / "ape-layout" / "non-APE" / "head-phantom.zip")
    found = {s.role_hint: read_scanned(source, s, threads=1) for s in scan(source).series}
    source.close()
    return found["thin"], found["thick"]


@pytest.mark.real
@pytest.mark.parametrize("upper", [False, True])
def test_agreement_is_that_of_the_true_thin_series_and_the_image_gains(
    pair: tuple[Volume, Volume], upper: bool
) -> None:
    fit = fit_pair(*(half(v, not upper) for v in pair))
    thin, thick = (half(v, upper) for v in pair)
    operator = slice_operator(fit.profile, np.asarray(thick.geometry.z_mm), np.asarray(thin.geometry.z_mm))
    true_rms, _ = residual_rms(thin.hu, thick.hu, operator)
    guess = interpolated(thick, thin.geometry, "cubic")
    settings = ComposeSettings(profile=fit.profile, noise_hu=fit.noise_hu)
    without, _ = compose(guess, WINDOW, settings.measured(thick, thin.geometry), ComposeSettings(consistency=False))
    with_it, figures = compose(guess, WINDOW, settings.measured(thick, thin.geometry), settings)
    assert 0.8 < figures["rms_after_hu"] / true_rms < 1.1
    assert figures["rms_before_hu"] > 5 * true_rms
    assert figures["warning"] == ""
    assert psnr(with_it, thin.hu) > psnr(without, thin.hu) + 1.0


@pytest.mark.real
def test_a_wrong_operator_is_said_on_genuine_slices(pair: tuple[Volume, Volume]) -> None:
    thin, thick = (half(v, True) for v in pair)
    fit = fit_pair(*(half(v, False) for v in pair))
    z = np.asarray(thick.geometry.z_mm), np.asarray(thin.geometry.z_mm)
    for profile, verdict in (
        (fit.profile, "agrees"),
        (fit.profile.shifted(2.0), "shifted"),
        (SliceProfile("box", 2.5), "wider"),
        (SliceProfile("box", 9.0), "narrower-or-smoothed"),
    ):
        assert check_operator(thin.hu, thick.hu, *z, profile, 3.0).verdict == verdict, str(profile)
        wrong, _ = residual_rms(thin.hu, thick.hu, slice_operator(profile, *z))
        assert bool(fit.said_of(profile, wrong)) == (verdict != "agrees")
    assert "box 5 mm is not this protocol's slice profile" in fit.stated_is_wrong


@pytest.mark.real
@pytest.mark.parametrize(("change", "said"), [("shift", "the slice positions"), ("wide", "are left where")])
def test_a_wrong_operator_is_said_without_a_pair(pair: tuple[Volume, Volume], change: str, said: str) -> None:
    thin, thick = (half(v, True) for v in pair)
    fit = fit_pair(*(half(v, False) for v in pair))
    assumed = fit.profile.shifted(2.0) if change == "shift" else SliceProfile("box", 10.0)
    guess = interpolated(thick, thin.geometry, "cubic")
    how = ComposeSettings(profile=assumed, noise_hu=fit.noise_hu)
    _, figures = compose(guess, WINDOW, how.measured(thick, thin.geometry), how)
    assert said in figures["warning"]


def test_a_phantoms_own_profile_is_recovered() -> None:
    patient = make_patient(3, size=64, n_thin=80)
    fit = fit_pair(patient.thin, patient.thick)
    assert fit.profile.fwhm_mm == pytest.approx(patient.settings.thick_fwhm_mm, abs=0.3)
    assert abs(fit.profile.shift_mm) < 0.1
    # Thick noise, and the thin slices' own averaged over five.
    expected = np.hypot(patient.settings.thick_sigma_hu, patient.settings.thin_sigma_hu / np.sqrt(5))
    assert fit.noise_hu == pytest.approx(expected, rel=0.25)


def test_protocols_combine_by_medians() -> None:
    rows = ((5.0, 4.0, 6.0), (9.0, 30.0, 40.0), (5.2, 5.0, 5.5))
    fits = [ProtocolFit(SliceProfile("box", w), n, 5.0, stated) for w, n, stated in rows]
    assert combined(fits) == ProtocolFit(SliceProfile("box", 5.2), 5.0, 5.0, 6.0)
    assert combined(fits).stated_is_wrong == ""
    assert "true thin series miss" in replace(combined(fits), stated_rms_hu=9.0).stated_is_wrong
