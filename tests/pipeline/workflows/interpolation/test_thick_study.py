"""Which series is interpolated, wherever it comes from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentcache import InputError
from pipeline.identity import Keys
from pipeline.workflows import ThickStudy, read_thick
from tests.support.dicom_files import anatomy, enhanced, series_files, zip_of
from tests.support.nifti_files import nifti

KEYS = Keys(b"0123456789abcdef")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "media"
    place.mkdir()
    for number, data in enumerate(series_files(anatomy())):
        (place / f"IM{number:04d}").write_bytes(data)
    (place / "DICOMDIR").write_bytes(b"")
    return place


def test_zip_folder_and_directory_file_are_one_study(folder: Path, tmp_path: Path) -> None:
    files = [path.read_bytes() for path in sorted(folder.glob("IM*"))]
    zipped = zip_of(tmp_path / "thick.zip", files)
    found = [read_thick(str(source), 1.0) for source in (zipped, folder, folder / "DICOMDIR")]
    keys = {ThickStudy(scanned, volume, KEYS).series_key for scanned, volume in found}
    assert len(keys) == 1
    for _, volume in found[1:]:
        np.testing.assert_array_equal(volume.hu, found[0][1].hu)
    assert ThickStudy(*found[0], KEYS).layout is None


def test_one_enhanced_instance_is_a_study(tmp_path: Path) -> None:
    source = zip_of(tmp_path / "enhanced.zip", [enhanced(anatomy(), list(5.0 * np.arange(8)))])
    _, volume = read_thick(str(source), 1.0)
    assert volume.hu.shape == (8, 32, 32)


def test_nifti_gets_keys_of_its_own_bytes(tmp_path: Path) -> None:
    scanned, volume = read_thick(str(nifti(tmp_path / "a.nii.gz")), 1.0)
    study = ThickStudy(scanned, volume, KEYS)
    assert study.layout is not None
    other = ThickStudy(*read_thick(str(nifti(tmp_path / "b.nii", np.zeros((9, 9, 9), np.int16))), 1.0), KEYS)
    assert study.series_key != other.series_key
    assert study.identity(False).study_uid.startswith("2.25.")
    with pytest.raises(InputError):
        study.identity(True)


@pytest.mark.parametrize(
    ("modality", "sop_class", "said"),
    [
        ("MR", "1.2.840.10008.5.1.4.1.1.4", "MR image"),
        ("PT", "1.2.840.10008.5.1.4.1.1.128", "PET image"),
    ],
)
def test_other_modalities_are_named(tmp_path: Path, modality: str, sop_class: str, said: str) -> None:
    def other(ds, index):  # type: ignore[no-untyped-def]
        ds.Modality, ds.SOPClassUID = modality, sop_class

    source = zip_of(tmp_path / "other.zip", series_files(anatomy(), tweak=other))
    with pytest.raises(InputError, match=said):
        read_thick(str(source), 1.0)


def test_a_single_slice_and_thin_slices_are_named(tmp_path: Path) -> None:
    single = zip_of(tmp_path / "single.zip", series_files(anatomy(1)))
    with pytest.raises(InputError, match="too few for a volume"):
        read_thick(str(single), 1.0)
    thin = zip_of(tmp_path / "thin.zip", series_files(anatomy(), thickness=1.0, z=range(8)))
    with pytest.raises(InputError, match="as fine already"):
        read_thick(str(thin), 1.0)
    flat = nifti(tmp_path / "flat.nii", np.zeros((9, 9, 1), np.int16))
    with pytest.raises(InputError, match="1 slices"):
        read_thick(str(flat), 1.0)
