"""Drawn thick slices: within what scanners do, the same for the same key, and true to a real scan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pipeline.archive import open_archive
from pipeline.forward_model import draw_thick, fit_pair, measurement_noise, slice_operator, thick_under
from pipeline.forward_model.simulation import drawn_profile
from pipeline.reading import pointer_of, read_series, scan
from pipeline.volume import Geometry, Volume


def thin(count: int = 60, spacing: float = 1.0) -> Geometry:
    affine = ((0.0, 0.0, 0.8, 0.0), (0.0, 0.8, 0.0, 0.0), (spacing, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    return Geometry((count, 8, 8), affine, tuple(spacing * np.arange(count)), spacing)


@settings(deadline=None)
@given(st.text(max_size=20), st.floats(3.0, 7.5), st.floats(0.6, 1.5))
def test_a_draw_is_a_series_that_a_scanner_could_have_made(key: str, thickness: float, spacing: float) -> None:
    at = thin(120, spacing)
    drawn = draw_thick(at, thickness, key)
    assert drawn is not None
    assert drawn == draw_thick(at, thickness, key)
    steps = np.diff(drawn.z_mm)
    assert np.allclose(steps, steps[0])
    assert 0.6 * thickness - 1e-6 <= steps[0] <= thickness + 1e-6
    assert at.z_mm[0] <= drawn.z_mm[0]
    assert drawn.z_mm[-1] <= at.z_mm[-1]
    for first, weights in zip(drawn.first, drawn.weights, strict=True):
        assert sum(weights) == pytest.approx(1.0, abs=1e-4)
        assert first + len(weights) <= 120


def test_every_kind_of_profile_and_of_overlap_is_drawn() -> None:
    drawn = [d for key in range(60) if (d := draw_thick(thin(), 5.0, str(key))) is not None]
    kinds = {("gaussian" in d.profile, "blurred" in d.profile) for d in drawn}
    assert kinds == {(True, False), (False, False), (False, True)}
    steps = np.asarray([np.diff(d.z_mm)[0] for d in drawn])
    assert (steps > 4.99).any()
    assert (steps < 4.5).any()
    assert len({round(d.z_mm[0], 3) for d in drawn}) > 50
    widths = [drawn_profile(np.random.default_rng(seed), 5.0).fwhm_mm for seed in range(200)]
    assert 3.0 <= min(widths) < 4.2
    assert 6.5 < max(widths) <= 7.5


def test_noise_left_by_averaging_counts() -> None:
    quiet, loud = (draw_thick(thin(), 5.0, "k", noise) for noise in (0.0, 1000.0))
    assert quiet is not None
    assert loud is not None
    assert 2.0 <= quiet.noise_hu <= 8.0
    assert loud.noise_hu == 0.0


def test_a_short_series_gives_none() -> None:
    assert draw_thick(thin(12), 5.0, "k") is None


def half(volume: Volume, start: int, stop: int) -> Volume:
    at = volume.geometry
    return replace(volume, hu=volume.hu[start:stop], geometry=at.with_z(list(at.z_mm[start:stop])))


@pytest.mark.real
@pytest.mark.parametrize(("fitted", "used"), [((0, 14), (14, 28)), ((14, 28), (0, 14))])
def test_a_real_thick_slice_is_met_within_its_noise(
    real_data: Path, fitted: tuple[int, int], used: tuple[int, int]
) -> None:
    """Profile of one half of a scanned pair, thick slices of the other half from its thin ones."""
    source = open_archive(str(real_data / "ape-layout" / "non-APE" / "head-phantom.zip"))
    found = {one.role_hint: read_series(pointer_of(one)) for one in scan(source).series if one.role_hint != "other"}
    fit = fit_pair(half(found["thin"], 5 * fitted[0], 5 * fitted[1]), half(found["thick"], *fitted))
    thick, fine = half(found["thick"], *used), half(found["thin"], 5 * used[0], 5 * used[1])
    z = np.asarray(thick.geometry.z_mm)
    made = thick_under(fit.profile, z, fine.geometry, thick.geometry.thickness_mm).of(fine)
    judged = slice_operator(fit.profile, z, np.asarray(fine.geometry.z_mm)).judged
    misfit = made.hu[judged].astype(float) - thick.hu[judged]
    assert np.sqrt(np.mean(misfit**2)) <= 1.3 * measurement_noise(thick.hu)
