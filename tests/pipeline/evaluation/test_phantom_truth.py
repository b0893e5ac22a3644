"""What a phantom's archive says of its own nodules and vessels, and that they measure as they were built."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluation.phantom_truth import known_structures, phantom_recipe, structures
from pipeline.metrics import holds, measurable, volume_errors
from pipeline.phantom import Segment, make_patient, write_dataset
from pipeline.volume import SeriesPointer


def pointer(path: Path) -> SeriesPointer:
    return SeriesPointer("k", ((str(path), 0, 0),))


def test_a_phantoms_zip_tells_its_structures_and_other_zips_none(tmp_path: Path) -> None:
    (path,) = write_dataset(tmp_path, patients=1, size=32, n_thin=60, seed=1)
    lattice = make_patient(1001, 32, 60).thin.geometry
    found = known_structures(pointer(path), lattice)
    assert found == tuple(s for s in structures(make_patient(1001, 48, 60)) if holds(lattice, s)), (
        "size changes nothing"
    )
    assert {s.kind for s in found} >= {"vessel"}
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.comment = b"not json"
    assert phantom_recipe(pointer(other)) is None
    assert known_structures(pointer(tmp_path), lattice) == ()


def test_most_structures_measure_as_built_without_noise() -> None:
    """At 1.25 mm pixels. Those that do not are left out by what the truth says, not by what a method makes of them."""
    patient = make_patient(2, 256, 48)
    truth, lattice = patient.thin_truth, patient.thin.geometry
    inside = [s for s in structures(patient) if holds(lattice, s)]
    kept = measurable(truth, lattice, inside)
    assert 0.5 * len(inside) < len(kept) < len(inside)
    found = volume_errors(truth, lattice, kept)
    assert found["vessel"]["count"] >= 10
    assert abs(found["vessel"]["total_error"]) < 0.1


def test_a_vessel_beside_another_is_left_out() -> None:
    patient = make_patient(2, 16, 40)
    alone = Segment("artery", (60.0, 0.0, 120.0), (60.0, 0.0, 140.0), 4.0, 4.0, 3)
    beside = Segment("vein", (64.0, 0.0, 120.0), (64.0, 0.0, 140.0), 4.0, 4.0, 3)
    only = structures(type(patient)(**{**vars(patient), "vessels": (alone,), "nodules": ()}))
    assert [s.kind for s in only] == ["vessel"]
    assert only[0].volume_mm3 == pytest.approx(np.pi * 4 * 10)
    assert structures(type(patient)(**{**vars(patient), "vessels": (alone, beside), "nodules": ()})) == ()
