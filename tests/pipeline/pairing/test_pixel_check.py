from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.archive import open_archive
from pipeline.forward_model import SliceProfile, slice_operator
from pipeline.pairing import prove_pair
from pipeline.phantom import PhantomPatient, make_patient
from pipeline.reading import pointer_of, read_series, scan
from pipeline.volume import Volume


@pytest.fixture(scope="module")
def patients() -> list[PhantomPatient]:
    return [make_patient(seed, size=64, n_thin=80) for seed in (1, 2)]


def moved(volume: Volume, dz_mm: float) -> Volume:
    """The same pixels at other positions."""
    z = np.asarray(volume.geometry.z_mm) + dz_mm
    return replace(volume, geometry=volume.geometry.with_z(z))


def test_a_phantom_pair_is_proved_with_its_profile(patients: list[PhantomPatient]) -> None:
    proof = prove_pair(patients[0].thick, patients[0].thin)
    assert proof.ok, proof.reason
    assert proof.profile is not None
    assert proof.profile.fwhm_mm == pytest.approx(patients[0].settings.thick_fwhm_mm, rel=0.15)
    assert abs(proof.profile.shift_mm) < 0.6
    assert proof.residual_hu < proof.threshold_hu / 3
    assert json.loads(json.dumps(proof.evidence))["profile"]["kind"] == proof.profile.kind


def test_another_patients_thin_series_is_refused(patients: list[PhantomPatient]) -> None:
    proof = prove_pair(patients[0].thick, patients[1].thin)
    assert not proof.ok
    assert "does not average to the thick one" in proof.reason


@pytest.mark.parametrize("axis", [1, 2])
def test_a_pair_two_pixels_apart_is_refused(patients: list[PhantomPatient], axis: int) -> None:
    thick = replace(patients[0].thick, hu=np.roll(patients[0].thick.hu, 2, axis))
    assert not prove_pair(thick, patients[0].thin).ok


@pytest.mark.parametrize("dz_mm", [-9.0, 4.0, 15.0])
def test_wrong_positions_are_refused(patients: list[PhantomPatient], dz_mm: float) -> None:
    assert not prove_pair(moved(patients[0].thick, dz_mm), patients[0].thin).ok


def test_an_offset_below_half_a_slice_is_measured(patients: list[PhantomPatient]) -> None:
    proof = prove_pair(moved(patients[0].thick, 1.5), patients[0].thin)
    assert proof.ok
    assert proof.profile is not None
    assert proof.profile.shift_mm == pytest.approx(-1.5, abs=0.6)


def test_noise_does_not_refuse_a_true_pair(patients: list[PhantomPatient]) -> None:
    thin = patients[0].thin
    rng = np.random.default_rng(0)
    operator = slice_operator(
        SliceProfile("box", 5.0), np.asarray(patients[0].thick.geometry.z_mm), np.asarray(thin.geometry.z_mm)
    )
    loud = thin.hu + rng.normal(0, 60, thin.hu.shape)
    thick = operator.apply(patients[0].thin_truth) + rng.normal(0, 30, patients[0].thick.hu.shape)
    proof = prove_pair(replace(patients[0].thick, hu=thick.astype(np.int16)), replace(thin, hu=loud.astype(np.int16)))
    assert proof.ok, proof.reason
    assert proof.noise_hu > 25


def test_too_little_in_common_proves_nothing(patients: list[PhantomPatient]) -> None:
    thin = patients[0].thin
    few = Volume(thin.hu[:8], replace(thin.geometry, shape_zyx=(8, 64, 64), z_mm=thin.geometry.z_mm[:8]))
    proof = prove_pair(patients[0].thick, few)
    assert not proof.ok
    assert "fewer than 3" in proof.reason


def test_a_thin_series_of_part_of_the_field_is_proved_by_position(patients: list[PhantomPatient]) -> None:
    thin, thick = patients[0].thin, patients[0].thick
    lower = np.asarray(thin.geometry.affine) @ np.diag([1.0, 1.0, 1.0, 1.0])
    lower[:3, 3] += 20 * lower[:3, 1]
    part = replace(thin.geometry, shape_zyx=(80, 40, 64), affine_lps=tuple(map(tuple, lower.tolist())))
    assert prove_pair(thick, Volume(thin.hu[:, 20:60], part)).ok
    misplaced = Volume(thin.hu[:, 14:54], part)
    assert "does not average to the thick one" in prove_pair(thick, misplaced).reason


def test_a_thin_field_beyond_the_thick_one_is_refused(patients: list[PhantomPatient]) -> None:
    thin, thick = patients[0].thin, patients[0].thick
    half = Volume(thick.hu[:, :32], replace(thick.geometry, shape_zyx=(len(thick.hu), 32, 64)))
    proof = prove_pair(half, thin)
    assert not proof.ok
    assert "beyond the measured one" in proof.reason


@pytest.mark.real
def test_the_real_pair_is_proved_and_a_pixels_shift_is_not(real_data: Path) -> None:
    source = open_archive(real_data / "ape-layout" / "non-APE" / "head-phantom.zip")
    one, other = (read_series(pointer_of(s)) for s in scan(source).series)
    thick, thin = sorted((one, other), key=lambda v: len(v.hu))
    proof = prove_pair(thick, thin)
    assert proof.ok, proof.reason
    assert proof.residual_hu < 12
    assert proof.profile is not None
    assert 5.0 <= proof.profile.fwhm_mm <= 6.7
    assert not prove_pair(replace(thick, hu=np.roll(thick.hu, 1, 2)), thin).ok
    assert not prove_pair(moved(thick, 4.0), thin).ok
