"""NIfTI out: laid out as the source was, whole or absent, saying what it is."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from latentcache import InputError
from pipeline.reading import read_nifti
from pipeline.writing import Provenance, write_nifti
from tests.support.nifti_files import RAS, nifti

SAID = Provenance(kind="generated", source_key="k", window=(1024.0, 4096.0), spacing_mm=1.0)


def test_a_derived_volume_lies_where_its_source_does(tmp_path: Path) -> None:
    affine = RAS[:, [2, 0, 1, 3]].copy()  # the file's first axis runs along z
    affine[:3, 0] *= -1
    source = read_nifti(nifti(tmp_path / "a.nii.gz", np.zeros((8, 32, 20), np.int16) - 1000, affine))
    target = source.volume.geometry.thin_grid(1.0)
    hu = np.random.default_rng(0).integers(-1000, 1000, target.shape_zyx).astype(np.int16)
    (path,) = write_nifti({"thin": hu}, target, source.layout, tmp_path / "out", SAID)
    again = read_nifti(path)
    np.testing.assert_array_equal(again.volume.hu, hu)
    np.testing.assert_allclose(again.volume.geometry.affine, target.affine, atol=1e-4)
    image = nibabel.load(path)
    assert image.shape == (40, 32, 20)
    assert image.get_data_dtype() == np.int16
    assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
    assert bytes(image.header["descrip"]).startswith(b"SYNTHETIC")
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["SyntheticData"] == "YES"
    with pytest.raises(InputError, match="exists"):
        write_nifti({"thin": hu}, target, source.layout, tmp_path / "out", SAID)
