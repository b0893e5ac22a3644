"""NIfTI in: HU, positions and layout as the file has them; what cannot be used is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentcache import InputError
from pipeline.archive import is_nifti
from pipeline.reading import read_nifti
from tests.support.nifti_files import RAS, body, nifti


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_values_and_positions(tmp_path: Path, suffix: str) -> None:
    path = nifti(tmp_path / f"thick{suffix}")
    assert is_nifti(path)
    found = read_nifti(path)
    assert found.layout.suffix == suffix
    assert found.volume.hu.dtype == np.int16
    np.testing.assert_array_equal(found.volume.hu, body().transpose(2, 1, 0))
    assert found.volume.geometry.spacing_mm_zyx == pytest.approx((5.0, 0.8, 0.8))
    assert found.volume.geometry.z_mm == pytest.approx(5.0 * np.arange(8))
    assert found.volume.flags == ()


def test_slices_from_head_to_feet_are_turned(tmp_path: Path) -> None:
    affine = RAS.copy()
    affine[:3, 2] *= -1
    found = read_nifti(nifti(tmp_path / "a.nii", affine=affine))
    assert found.volume.geometry.z_mm == pytest.approx(5.0 * np.arange(-7, 1))
    np.testing.assert_array_equal(found.volume.hu, body().transpose(2, 1, 0)[::-1])


def test_fractions_stay_and_scaled_values_are_applied(tmp_path: Path) -> None:
    found = read_nifti(nifti(tmp_path / "a.nii", body().astype(np.float32) + 0.25))
    assert found.volume.hu.dtype == np.float32
    assert found.volume.hu.min() % 1 == 0.25


def test_a_tilted_gantry_is_flagged(tmp_path: Path) -> None:
    affine = RAS.copy()
    affine[1, 2] = 1.5
    import nibabel

    image = nibabel.Nifti1Image(body(), affine)
    image.set_sform(affine, 1)
    nibabel.save(image, tmp_path / "a.nii")
    found = read_nifti(tmp_path / "a.nii")
    assert found.volume.flags == ("gantry-tilt",)
    assert found.volume.geometry.spacing_mm_zyx[0] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"code": 0}, "no affine"),
        ({"unit": "meter"}, "lengths in meter"),
        ({"hu": np.zeros((4, 4, 4, 2), np.int16)}, "an array of 4x4x4x2"),
        ({"hu": np.full((4, 4, 4), np.nan, np.float32)}, "NaN"),
        ({"hu": np.zeros((4, 4, 4), np.complex64)}, "complex64"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_nifti(nifti(tmp_path / "a.nii", **options))


@pytest.mark.parametrize("kept", [100, 2000])
def test_a_torn_file_is_refused(tmp_path: Path, kept: int) -> None:
    path = nifti(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="not read"):
        read_nifti(path)


def test_without_nibabel_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nifti(tmp_path / "a.nii")
    monkeypatch.setitem(__import__("sys").modules, "nibabel", None)
    with pytest.raises(InputError, match=r"ctpipe\[nifti\]"):
        read_nifti(path)
