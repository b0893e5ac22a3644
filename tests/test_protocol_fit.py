"""A slice operator fitted on other data, on a genuine thick and thin pair of one acquisition."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.archive import open_source
from pipeline.compose import ComposeSettings, compose, interpolated
from pipeline.consistency import residual_rms
from pipeline.hu import Window
from pipeline.phantom import make_patient
from pipeline.profile_fit import check_operator
from pipeline.protocol_fit import ProtocolFit, combined, fit_pair
from pipeline.series import scan
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.volume import Volume
from pipeline.volume_reader import read_scanned

WINDOW = Window(40, 400)


def psnr(hu: NDArray[Any], truth: NDArray[Any]) -> float:
    a, b = (np.clip(v.astype(np.float32), WINDOW.lower, WINDOW.upper) for v in (hu, truth))
    return float(10 * np.log10(WINDOW.width**2 / np.mean((a - b) ** 2)))


def stripes(volume: Volume, parity: int) -> Volume:
    """Every other band of 32 rows, in half the columns to spare time: data apart, but of the same noise."""
    rows = np.flatnonzero(np.arange(volume.hu.shape[1]) // 32 % 2 == parity)
    hu = np.ascontiguousarray(volume.hu[:, rows][:, :, ::2])
    return replace(volume, hu=hu, geometry=replace(volume.geometry, shape_zyx=hu.shape))


@pytest.fixture(scope="module")
def pair(real_data: Path) -> tuple[Volume, Volume]:
    source = open_source(real_data / "ape-layout" / "non-APE" / "head-phantom.zip")
    found = {s.role_hint: read_scanned(source, s, threads=1) for s in scan(source).series}
    source.close()
    return found["thin"], found["thick"]


@pytest.mark.real
def test_agreement_is_that_of_the_true_thin_series_and_the_image_gains(pair: tuple[Volume, Volume]) -> None:
    fit = fit_pair(*(stripes(v, 0) for v in pair))
    thin, thick = (stripes(v, 1) for v in pair)
    operator = slice_operator(fit.profile, np.asarray(thick.geometry.z_mm), np.asarray(thin.geometry.z_mm))
    true_rms, _ = residual_rms(thin.hu, thick.hu, operator)
    guess = interpolated(thick, thin.geometry, "cubic")
    without, _ = compose(guess, WINDOW, thick, thin.geometry, ComposeSettings(consistency=False))
    settings = ComposeSettings(profile=fit.profile, noise_hu=fit.noise_hu)
    with_it, figures = compose(guess, WINDOW, thick, thin.geometry, settings)
    assert 0.8 < figures["rms_after_hu"] / true_rms < 1.1
    assert figures["rms_before_hu"] > 5 * true_rms
    assert psnr(with_it, thin.hu) > psnr(without, thin.hu) + 1.0


@pytest.mark.real
def test_a_wrong_operator_is_said_on_genuine_slices(pair: tuple[Volume, Volume]) -> None:
    thin, thick = (stripes(v, 1) for v in pair)
    fit = fit_pair(*(stripes(v, 0) for v in pair))
    z = np.asarray(thick.geometry.z_mm), np.asarray(thin.geometry.z_mm)
    for profile, verdict in (
        (fit.profile, "agrees"),
        (fit.profile.shifted(2.0), "shifted"),
        (SliceProfile("box", 2.5), "wider"),
        (SliceProfile("box", 9.0), "narrower-or-smoothed"),
    ):
        assert check_operator(thin.hu, thick.hu, *z, profile, 3.0).verdict == verdict, str(profile)


def test_a_phantoms_own_profile_is_recovered() -> None:
    patient = make_patient(3, size=64, n_thin=80)
    fit = fit_pair(patient.thin, patient.thick)
    assert fit.profile.fwhm_mm == pytest.approx(patient.settings.thick_fwhm_mm, abs=0.3)
    assert abs(fit.profile.shift_mm) < 0.1
    # Thick noise, and the thin slices' own averaged over five.
    expected = np.hypot(patient.settings.thick_sigma_hu, patient.settings.thin_sigma_hu / np.sqrt(5))
    assert fit.noise_hu == pytest.approx(expected, rel=0.25)


def test_protocols_combine_by_medians() -> None:
    fits = [ProtocolFit(SliceProfile("box", w), n) for w, n in ((5.0, 4.0), (9.0, 30.0), (5.2, 5.0))]
    assert combined(fits) == ProtocolFit(SliceProfile("box", 5.2), 5.0)
