"""One Enhanced CT instance through the validator and other readers; refused by name where the source lacks things."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest

from latentcache import InputError
from pipeline.volume import SourceHeader
from pipeline.writing import read_provenance, write_enhanced_ct
from tests.pipeline.writing.test_ct_image import HEADER, IDENTITY, PROVENANCE, geometry, pixels, validator_errors

FULL = replace(HEADER, public={**HEADER.public, "ManufacturerModelName": "Model", "BodyPartExamined": "CHEST"})


@pytest.mark.parametrize("syntax", ["explicit", "jpegls"])
@pytest.mark.parametrize("tilt", [0.0, 17.0])
def test_the_validator_finds_no_error_and_pixels_come_back(tmp_path: Path, syntax: str, tilt: float) -> None:
    hu, at = pixels(), geometry(tilt)
    written = write_enhanced_ct(
        hu, at, FULL, tmp_path / "s", uids=IDENTITY, provenance=PROVENANCE, transfer_syntax=syntax
    )
    (path,) = written.paths
    assert validator_errors(path) == []
    ds = pydicom.dcmread(path)
    shared = ds.SharedFunctionalGroupsSequence[0]
    rescale = shared.PixelValueTransformationSequence[0]
    got = ds.pixel_array * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
    np.testing.assert_array_equal(got, hu)
    for index, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose([float(v) for v in position], at.slice_position(index), atol=1e-4)
    assert len(shared.DerivationImageSequence[0].SourceImageSequence) == 4
    assert ds.SyntheticData == "YES"
    assert read_provenance(ds)["checkpoint_sha256"] == "0" * 64


def test_other_readers_see_the_same_lattice(tmp_path: Path) -> None:
    import highdicom

    from pipeline.archive import open_archive
    from pipeline.reading import read_series, scan
    from pipeline.volume import SeriesPointer

    hu, at = pixels(), geometry()
    written = write_enhanced_ct(hu, at, FULL, tmp_path / "s", uids=IDENTITY, provenance=PROVENANCE)
    volume = highdicom.imread(written.paths[0]).get_volume()
    np.testing.assert_allclose(volume.spacing, at.spacing_mm_zyx, atol=1e-4)
    np.testing.assert_allclose(sorted(volume.array.ravel())[:5], sorted(hu.ravel())[:5])
    (found,) = scan(open_archive(str(tmp_path / "s"))).series
    ours = read_series(SeriesPointer("k", tuple(found.pointer_members)), threads=1)
    np.testing.assert_array_equal(ours.hu, hu)
    np.testing.assert_allclose(ours.geometry.affine, at.affine, atol=1e-4)


def test_nothing_of_the_patient_is_in_the_file(tmp_path: Path) -> None:
    written = write_enhanced_ct(pixels(), geometry(), FULL, tmp_path / "s", uids=IDENTITY, provenance=PROVENANCE)
    raw = written.paths[0].read_bytes()
    for secret in (b"SECRET-ID", b"Secret^Name", b"20200102", b"1.2.3.4"):
        assert secret not in raw


@pytest.mark.parametrize("lacking", ["Manufacturer", "ManufacturerModelName", "BodyPartExamined"])
def test_what_the_source_lacks_is_named(tmp_path: Path, lacking: str) -> None:
    poor = SourceHeader(public={k: v for k, v in FULL.public.items() if k != lacking})
    with pytest.raises(InputError, match=f"without {lacking}"):
        write_enhanced_ct(pixels(), geometry(), poor, tmp_path / "s", uids=IDENTITY, provenance=PROVENANCE)
    assert not (tmp_path / "s").exists()


def test_a_source_with_text_in_its_pixels_is_refused(tmp_path: Path) -> None:
    header = replace(FULL, public={**FULL.public, "BurnedInAnnotation": "YES"})
    with pytest.raises(InputError, match="Burned In Annotation"):
        write_enhanced_ct(pixels(), geometry(), header, tmp_path / "s", uids=IDENTITY, provenance=PROVENANCE)
    assert not (tmp_path / "s").exists()
