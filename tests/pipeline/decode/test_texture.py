"""A draw's texture: as rough and as noisy as the true thin slices, and a mean untouched."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.decode import ComposeSettings, average_samples
from pipeline.decode.texture import with_texture
from pipeline.forward_model import ThickMeasurement
from pipeline.metrics import Texture, TexturePower, noise_texture, slice_inconsistency
from pipeline.phantom import PhantomPatient, make_patient
from pipeline.volume import Window, common_slices


def pair(seed: int) -> tuple[PhantomPatient, ThickMeasurement, slice]:
    patient = make_patient(seed, 160, 60, "APE")
    inside = common_slices(patient.thick.geometry, patient.thin.geometry)
    return patient, ThickMeasurement.of(patient.thick, np.array(patient.thin.geometry.z_mm)[inside]), inside


def test_a_phantom_without_noise_gets_the_texture_of_other_patients() -> None:
    """Slice-to-slice inconsistency and the noise power spectrum within 10% of the noisy thin series."""
    other, seen, inside = pair(31)
    wanted = Texture.of_noise(TexturePower.of(other.thin.hu[inside], seen.operator))
    patient, thick, inside = pair(32)
    truth = patient.thin.hu[inside]
    clean = np.rint(patient.thin_truth[inside]).astype(np.int16)
    found, figures = with_texture(clean, thick, wanted, -1024)
    again, _ = with_texture(clean, thick, wanted, -1024)
    np.testing.assert_array_equal(found, again)
    assert figures["texture_added_hu"] > 5
    window = Window()

    def seen_through(hu: NDArray[np.generic]) -> NDArray[np.float32]:
        return np.clip(hu.astype(np.float32), window.lower, window.upper)

    spacing = patient.thin.geometry.spacing_mm_zyx[1:]
    rough, noise = {}, {}
    for name, volume in (("clean", clean), ("textured", found)):
        rough[name] = slice_inconsistency(seen_through(volume), seen_through(truth))["roughness_ratio"]
        noise[name] = noise_texture(seen_through(volume), seen_through(truth), spacing)["ratio"]["std_hu"]
    assert rough["clean"] < 0.9
    assert abs(rough["textured"] - 1) < 0.1
    assert noise["clean"] < 0.9
    assert abs(noise["textured"] - 1) < 0.1
    # The clip to int16 aside, no thick slice changes.
    missed = thick.operator.matrix @ (found.astype(np.float64) - clean).reshape(len(found), -1)
    assert np.sqrt(np.mean(missed**2)) < 0.5


def test_a_draw_is_given_texture_and_a_mean_is_not() -> None:
    other, seen, inside = pair(31)
    wanted = Texture.of_noise(TexturePower.of(other.thin.hu[inside], seen.operator))
    patient, thick, inside = pair(32)
    grid = patient.thin.geometry.with_z(np.array(patient.thin.geometry.z_mm)[inside])
    window = Window()
    rng = np.random.default_rng(0)
    draws = [patient.thin_truth[inside] + rng.normal(0, 2, grid.shape_zyx).astype(np.float32) for _ in range(3)]
    plain = ComposeSettings("absolute")
    before = average_samples(iter(draws), window, thick, grid, plain, alarm=True)
    after = average_samples(iter(draws), window, thick, grid, ComposeSettings("absolute", texture=wanted), alarm=True)
    np.testing.assert_array_equal(after.hu, before.hu)
    assert before.spread is not None
    assert after.spread is not None
    assert before.alarm is not None
    assert after.alarm is not None
    np.testing.assert_array_equal(after.spread, before.spread)
    np.testing.assert_array_equal(after.alarm, before.alarm)
    assert before.sample is not None
    assert after.sample is not None
    assert np.std(after.sample.astype(np.float32) - before.sample) > 5
    assert after.sample_figures["texture_added_hu"] > 5
    assert "texture_added_hu" not in after.figures
    # What was added changed the agreement that is written by rounding alone.
    assert after.sample_figures["rms_after_hu"] == pytest.approx(before.sample_figures["rms_after_hu"], abs=0.2)
    alone = average_samples(iter(draws[:1]), window, thick, grid, ComposeSettings("absolute", texture=wanted))
    np.testing.assert_array_equal(alone.hu, after.sample)
    assert alone.figures["texture_added_hu"] == after.sample_figures["texture_added_hu"]
