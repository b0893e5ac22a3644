"""NIfTI files are archives of a dataset: catalogued by their bytes, read when needed, refused when they changed."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest

from latentcache import InputError, LatentStore
from pipeline.identity import PrivateStore
from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.ingest.summary import IngestSummary
from pipeline.reading import NIFTI_FLAG, read_series
from tests.support.dicom_files import anatomy

OPTIONS = IngestOptions(simulate_thick_mm=5.0, batch=4)
AFFINE = np.diag([-0.7, -0.7, 1.0, 1.0])


def nifti(path: Path, hu: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(hu.transpose(2, 1, 0).astype(np.int16), affine), path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    hu = anatomy(40).astype(np.int16) - 1024
    nifti(data / "APE" / "JANE_DOE.nii.gz", hu)
    nifti(data / "APE" / "other" / "mask.nii", (hu > 0).astype(np.int16))
    (data / "torn.nii.gz").write_bytes(gzip.compress(b"no volume" * 100))
    return data


def catalogued(data: Path) -> tuple[LatentStore, PrivateStore, IngestSummary]:
    url = str(data.parent / "store")
    summary = ingest(str(data), *open_stores(url), OPTIONS)
    return LatentStore.open(url), PrivateStore.open(url), summary


def test_a_thin_volume_is_catalogued_with_a_simulated_thick_series(dataset: Path) -> None:
    store, people, summary = catalogued(dataset)
    assert summary.simulated_pairs == 1
    (pair,) = store.pairs()
    thin, thick = (read_series(people.pointer(key)) for key in (pair.thin_key, pair.thick_key))
    assert thin.hu.shape[0] == 40
    assert NIFTI_FLAG in thin.flags
    assert len(thick.hu) < len(thin.hu)
    record = next(one for one in store.series() if one.series_key == pair.thin_key)
    assert (record.category, record.role, record.modality) == ("APE", "thin", "CT")
    assert thin.source_digest == record.source_digest
    assert thin.geometry.spacing_mm_zyx == pytest.approx((1.0, 0.7, 0.7))


def test_masks_and_torn_files_are_set_aside_with_their_reason(dataset: Path) -> None:
    store, _, _ = catalogued(dataset)
    reasons = {(one.status, one.reason) for one in store.series() if one.role == "other"}
    assert any(status == "ok" and "mask" in reason for status, reason in reasons)
    assert any(status == "quarantined" and "NIfTI" in reason for status, reason in reasons)
    assert not any("JANE" in reason or "torn" in reason for _, reason in reasons)


def test_an_unchanged_file_is_not_read_again_and_the_same_bytes_are_one_series(dataset: Path) -> None:
    before = catalogued(dataset)[0].series()
    (dataset / "copy.nii.gz").write_bytes((dataset / "APE" / "JANE_DOE.nii.gz").read_bytes())
    store, _, summary = catalogued(dataset)
    assert (summary.archives["unchanged"], summary.archives["new"]) == (3, 1)
    assert {one.series_key for one in store.series()} == {one.series_key for one in before}


def test_a_file_of_other_bytes_is_refused_not_read_for_the_old_one(dataset: Path) -> None:
    store, people, _ = catalogued(dataset)
    (pair,) = store.pairs()
    pointer = people.pointer(pair.thin_key)
    nifti(dataset / "APE" / "JANE_DOE.nii.gz", anatomy(40).astype(np.int16) - 1023)
    with pytest.raises(InputError, match="other bytes"):
        read_series(pointer)
    (dataset / "APE" / "JANE_DOE.nii.gz").unlink()
    with pytest.raises(InputError, match="no longer there") as told:
        read_series(pointer)
    assert "JANE" not in str(told.value)
