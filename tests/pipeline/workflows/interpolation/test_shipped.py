"""Thick slices in, thin ones out, by weights in the package: DICOM to DICOM, NIfTI to NIfTI."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch

from latentcache import InputError
from pipeline.forward_model import SliceProfile, slice_operator
from pipeline.phantom import write_dataset
from pipeline.reading import read_nifti
from pipeline.refiner import load_pretrained
from pipeline.workflows import (
    Interpolated,
    InterpolateJob,
    JobProgress,
    interpolate_study,
    read_thick,
    run_interpolation,
)
from pipeline.writing import read_provenance
from tests.support.nifti_files import RAS, body, nifti


@pytest.fixture(scope="module")
def zipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_dataset(tmp_path_factory.mktemp("archive"), patients=1, size=48, n_thin=40, seed=5)
    return path


@pytest.fixture(scope="module")
def done(zipped: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Interpolated, list[JobProgress]]:
    told: list[JobProgress] = []
    job = InterpolateJob(str(zipped), tmp_path_factory.mktemp("out"), device="cpu")
    return run_interpolation(job, told.append), told


def test_one_call_needs_no_network(zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    found = interpolate_study(zipped, tmp_path / "out", device="cpu")
    assert found.model == "default"
    assert len(list(found.folder.iterdir())) == found.slices == 5 * found.source_slices


def test_what_was_written_says_what_it_is(done: tuple[Interpolated, list[JobProgress]]) -> None:
    found, _ = done
    ds = pydicom.dcmread(found.folder / "00001.dcm")
    assert ds.SyntheticData == "YES"
    assert "a trained network" in ds.DerivationDescription
    assert "diffusion" not in ds.DerivationDescription
    said = read_provenance(ds)
    assert said["refiner_sha256"] == load_pretrained().sha256
    assert said["checkpoint_sha256"] == said["vae_sha256"] == ""
    assert said["sampling"]["model"] == "default"
    assert found.figures["profile"] == "box 5 mm"
    assert found.figures["certificate"]["said"]


def test_thin_slices_average_to_the_thick_ones(zipped: Path, done: tuple[Interpolated, list[JobProgress]]) -> None:
    found, _ = done
    _, thick = read_thick(str(zipped), 1.0)
    slices = [pydicom.dcmread(path) for path in sorted(found.folder.iterdir())]
    hu = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in slices])
    z = np.asarray([float(ds.ImagePositionPatient[2]) for ds in slices])
    operator = slice_operator(SliceProfile("box", 5.0), np.asarray(thick.geometry.z_mm), z)
    rms = np.sqrt(((operator.apply(hu) - thick.hu) ** 2).mean())
    assert rms == pytest.approx(found.figures["rms_after_hu"], abs=0.5)
    assert rms <= 1.1 * found.figures["noise_hu"]


def test_progress_rises_to_the_end(done: tuple[Interpolated, list[JobProgress]]) -> None:
    shares = [now.done for now in done[1]]
    assert shares == sorted(shares)
    assert (shares[-1], done[1][-1].total) == (100, 100)
    assert {now.step for now in done[1]} >= {"read", "refine", "write"}


def test_a_page_lies_beside_it(done: tuple[Interpolated, list[JobProgress]], zipped: Path, tmp_path: Path) -> None:
    found, _ = done
    assert found.page == found.folder.with_suffix(".html")
    assert found.page.is_file()
    assert interpolate_study(zipped, tmp_path / "out", page=False, device="cpu").page is None


def test_an_output_that_exists_is_refused_before_the_work(
    zipped: Path, done: tuple[Interpolated, list[JobProgress]]
) -> None:
    told: list[JobProgress] = []
    with pytest.raises(InputError, match="exists"):
        run_interpolation(InterpolateJob(str(zipped), done[0].folder.parent, device="cpu"), told.append)
    assert "refine" not in {now.step for now in told}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_nifti_comes_back_as_nifti_where_it_lay(tmp_path: Path, suffix: str) -> None:
    affine = RAS.copy()
    affine[:3, 2] *= -1  # the first slice is nearest to the head
    found = interpolate_study(nifti(tmp_path / f"thick{suffix}", affine=affine), tmp_path / "out", device="cpu")
    image = nibabel.load(found.folder / f"thin{suffix}")
    assert image.shape == (32, 32, 40)
    np.testing.assert_allclose(image.affine[:3, :3], affine[:3, :3] / (1, 1, 5), atol=1e-5)
    # The faces of the scanned range stay: a thick voxel's half before the first slice, a thin one's now.
    np.testing.assert_allclose(image.affine @ (0, 0, -0.5, 1), affine @ (0, 0, -0.5, 1), atol=1e-4)
    thin = read_nifti(found.folder / f"thin{suffix}").volume
    operator = slice_operator(SliceProfile("box", 5.0), 5.0 * np.arange(-7, 1), np.asarray(thin.geometry.z_mm))
    rms = np.sqrt(((operator.apply(thin.hu) - body().transpose(2, 1, 0)[::-1]) ** 2).mean())
    assert rms <= 1.1 * found.figures["noise_hu"]
    assert "no slice thickness" in " ".join(found.warnings)
    assert json.loads((found.folder / "provenance.json").read_text())["notes"][0] == found.warnings[0]


def test_doubts_stand_in_the_result_and_in_dicom(zipped: Path, tmp_path: Path) -> None:
    found = interpolate_study(zipped, tmp_path / "out", spacing_mm=0.4, device="cpu")
    (doubt,) = (one for one in found.warnings if "wanted slice spacing 0.4 mm" in one)
    assert doubt in read_provenance(pydicom.dcmread(found.folder / "00001.dcm"))["notes"]


def test_models_are_chosen_by_name_or_path(zipped: Path, tmp_path: Path) -> None:
    fast = load_pretrained("fast")
    named = interpolate_study(zipped, tmp_path / "a", model="fast", device="cpu", page=False)
    by_path = interpolate_study(zipped, tmp_path / "b", model=fast.path, device="cpu", page=False)
    assert named.model == by_path.model == "fast"
    with pytest.raises(InputError, match="no model 'nothing'"):
        interpolate_study(zipped, tmp_path / "c", model="nothing")


def test_denormals_are_flushed_where_the_network_computes(
    zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.refiner.pretrained_network import PretrainedNetwork

    seen: list[float] = []
    encode = PretrainedNetwork.encode

    def watched(self: PretrainedNetwork, *given: Any) -> Any:
        seen.append(float((torch.full((1,), 1e-39) * 1.0).item()))
        return encode(self, *given)

    monkeypatch.setattr(PretrainedNetwork, "encode", watched)
    interpolate_study(zipped, tmp_path / "out", device="cpu", page=False)
    assert set(seen) == {0.0}
    assert (torch.full((1,), 1e-39) * 1.0).item() != 0  # the caller's thread is as it was
