"""The uncertainty map through the validator and highdicom: floats as they were, on the same lattice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from latentcache import InputError
from pipeline.writing import read_provenance, write_parametric_map
from tests.pipeline.writing.test_ct_image import HEADER, IDENTITY, PROVENANCE, geometry, validator_errors

MAP = replace(PROVENANCE, kind="uncertainty")


def test_the_validator_and_highdicom_read_the_map(tmp_path: Path) -> None:
    import highdicom

    at = geometry()
    spread = np.random.default_rng(0).gamma(2.0, 6.0, at.shape_zyx).astype(np.float32)
    written = write_parametric_map(spread, at, HEADER, tmp_path / "s", uids=IDENTITY, provenance=MAP)
    (path,) = written.paths
    assert validator_errors(path) == []
    ds = pydicom.dcmread(path)
    np.testing.assert_array_equal(ds.pixel_array, spread)
    unit = ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0].MeasurementUnitsCodeSequence[0]
    assert unit.CodeValue == "[hnsf'U]"
    assert read_provenance(ds)["kind"] == "uncertainty"
    volume = highdicom.imread(path).get_volume()
    np.testing.assert_allclose(volume.spacing, at.spacing_mm_zyx, atol=1e-4)
    np.testing.assert_allclose(np.sort(volume.array.ravel()), np.sort(spread.ravel()), rtol=1e-6)
    with pytest.raises(InputError, match="exists"):
        write_parametric_map(spread, at, HEADER, tmp_path / "s", uids=IDENTITY, provenance=MAP)


def test_the_alarm_is_a_map_without_a_unit_that_the_validator_accepts(tmp_path: Path) -> None:
    at = geometry()
    alarm = np.random.default_rng(1).gamma(1.0, 1.0, at.shape_zyx).astype(np.float32)
    described = replace(PROVENANCE, kind="alarm")
    (path,) = write_parametric_map(alarm, at, HEADER, tmp_path / "s", uids=IDENTITY, provenance=described).paths
    assert validator_errors(path) == []
    ds = pydicom.dcmread(path)
    np.testing.assert_array_equal(ds.pixel_array, alarm)
    unit = ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0].MeasurementUnitsCodeSequence[0]
    assert (unit.CodeValue, unit.CodeMeaning) == ("1", "no units")
    assert ds.ContentLabel == "ALARM"
    assert ds.ImageType[3] == "QUANTITY"
