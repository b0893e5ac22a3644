"""The main job on a genuine scanner study: a head phantom scanned once, reconstructed at 5 mm and at 1 mm."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from pipeline.volume import Geometry
from pipeline.workflows import read_thick

pytestmark = pytest.mark.real

WINDOW = (-160.0, 240.0)


@dataclass(frozen=True)
class Study:
    """The genuine pair after ingest and encode, and a run whose untrained model equals its condition."""

    archive: Path
    store: Path
    run: Path
    ingested: dict[str, Any]


def ctpipe(*words: str | Path, code: int = 0) -> dict[str, Any]:
    """Run a command as a user would, and return its JSON."""
    command = [sys.executable, "-m", "cli.main", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"exit {done.returncode}: {done.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def study(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("pair")
    archive, store = real_data / "ape-layout", root / "store"
    ingested = ctpipe("ingest", archive, store)
    ctpipe("encode", store, "--vae", "tiny", "--roles", "thin,thick")
    # A run to interpolate with: one step on synthetic patients, at the same encode key.
    ctpipe("phantom", root / "phantoms", "--patients", "4", "--size", "64", "--thin-slices", "44")
    ctpipe("ingest", root / "phantoms", root / "small")
    ctpipe("encode", root / "small", "--vae", "tiny")
    ctpipe("train", root / "small", root / "run", "--preset", "tiny", "--max-steps", "1")
    return Study(archive, store, root / "run", ingested)


def slices(folder: Path) -> list[pydicom.Dataset]:
    """A written series, sorted by position along z."""
    found = [pydicom.dcmread(path) for path in folder.rglob("*.dcm")]
    return sorted(found, key=lambda d: float(d.ImagePositionPatient[2]))


def hu(series: list[pydicom.Dataset]) -> np.ndarray:
    return np.stack([d.pixel_array * float(d.RescaleSlope) + float(d.RescaleIntercept) for d in series])


def test_ingest_pairs_the_two_reconstructions(study: Study) -> None:
    from latentcache import LatentStore

    store = LatentStore.open(study.store)
    by_key = {s.series_key: s for s in store.series()}
    (pair,) = store.pairs()
    assert (by_key[pair.thick_key].n_slices, by_key[pair.thin_key].n_slices) == (28, 140)
    assert pair.status == "ok"
    assert pair.category == "non-APE"
    assert json.loads(pair.evidence)["pixel_proof"]


def test_decoded_thin_latents_keep_the_source_geometry_and_lose_nothing(study: Study, tmp_path: Path) -> None:
    from latentcache import LatentStore
    from pipeline.identity import PrivateStore
    from pipeline.reading import read_series
    from pipeline.vae import load_vae
    from pipeline.volume import Window, geometry_of

    ctpipe("decode", study.store, tmp_path / "out", "--to-dicom")
    store = LatentStore.open(study.store)
    (pair,) = store.pairs()
    written = slices(tmp_path / "out")
    source = read_series(PrivateStore.open(str(study.store)).pointer(pair.thin_key))
    assert len(written) == 140
    geometry = geometry_of({s.series_key: s for s in store.series()}[pair.thin_key])
    for index, dataset in enumerate(written):
        np.testing.assert_allclose(dataset.ImagePositionPatient, geometry.slice_position(index), atol=1e-4)
    np.testing.assert_allclose([float(v) for v in written[0].PixelSpacing], geometry.spacing_mm_zyx[1:], atol=1e-4)

    vae, window = load_vae("tiny"), Window()
    unit = window.to_unit(source.hu)
    in_memory = window.from_unit(vae.decode(vae.encode(unit), source.geometry.shape_zyx).numpy())
    truth = np.clip(source.hu.astype(np.float32), *WINDOW)

    def error(volume: np.ndarray) -> float:
        return float(np.abs(np.clip(volume, *WINDOW) - truth).mean())

    assert abs(error(hu(written)) - error(in_memory)) < 0.5


def test_interpolate_covers_the_extent_of_a_thick_study(study: Study, tmp_path: Path, real_data: Path) -> None:
    import zipfile

    thick = tmp_path / "thick.zip"
    source = real_data / "ape-layout" / "non-APE" / "head-phantom.zip"
    with zipfile.ZipFile(source) as whole, zipfile.ZipFile(thick, "w") as part:
        for name in whole.namelist():
            if name.startswith("1/"):
                part.writestr(name, whole.read(name))
    ctpipe("interpolate", thick, tmp_path / "out", "--checkpoint", study.run, "--spacing-mm", "1.0")
    at = read_thick(str(thick), 1.0)[1].geometry
    expected = at.thin_grid(1.0)
    assert expected.z_mm[0] == pytest.approx(at.z_mm[0] - 2.0)
    assert expected.z_mm[-1] == pytest.approx(at.z_mm[-1] + 2.0)
    (folder,) = (p for p in (tmp_path / "out").iterdir() if p.name != "private")
    assert_valid(folder, expected, tmp_path)


def errors_in(path: Path) -> list[str]:
    tool = Path(sys.executable).with_name("dciodvfy")
    said = subprocess.run([tool, path], capture_output=True, text=True, check=False)
    return [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]


def assert_valid(folder: Path, at: Geometry, scratch: Path) -> None:
    """dciodvfy finds no error in any file; pydicom, highdicom, SimpleITK and dcm2niix see the same lattice."""
    files = sorted(folder.glob("*.dcm"))
    assert len(files) == at.shape_zyx[0] == 140
    with ThreadPoolExecutor(2) as pool:
        assert [line for found in pool.map(errors_in, files) for line in found] == []
    expected = np.array([at.slice_position(i) for i in range(len(files))])
    for tool in (by_pydicom, by_highdicom, by_simpleitk, by_dcm2niix):
        positions, pixel, step = tool(folder, scratch)
        np.testing.assert_allclose(positions, expected, atol=1e-4, err_msg=tool.__name__)
        np.testing.assert_allclose(pixel, at.spacing_mm_zyx[1:], atol=1e-4, err_msg=tool.__name__)
        assert step == pytest.approx(at.spacing_mm_zyx[0], abs=1e-4), tool.__name__


Lattice = tuple[NDArray[np.float64], NDArray[np.float64], float]
"""Centre of the first pixel of every slice (LPS, ascending), row and column spacing, slice spacing; mm."""


def by_pydicom(folder: Path, _: Path) -> Lattice:
    found = slices(folder)
    positions = np.array([d.ImagePositionPatient for d in found], dtype=np.float64)
    return positions, np.array(found[0].PixelSpacing, dtype=np.float64), float(found[0].SpacingBetweenSlices)


def by_highdicom(folder: Path, _: Path) -> Lattice:
    import highdicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = highdicom.get_volume_from_series(slices(folder))
    affine = np.asarray(volume.affine)
    positions = np.array([affine[:3, 3] + k * affine[:3, 0] for k in range(volume.spatial_shape[0])])
    return positions[np.argsort(positions[:, 2])], np.asarray(volume.spacing[1:]), float(volume.spacing[0])


def by_simpleitk(folder: Path, _: Path) -> Lattice:
    import SimpleITK

    image = SimpleITK.ReadImage(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    points = [image.TransformIndexToPhysicalPoint((0, 0, k)) for k in range(image.GetSize()[2])]
    dx, dy, dz = image.GetSpacing()
    return np.array(points), np.array([dy, dx]), float(dz)


def by_dcm2niix(folder: Path, scratch: Path) -> Lattice:
    import nibabel

    nifti = scratch / "nifti"
    nifti.mkdir()
    tool = Path(sys.executable).with_name("dcm2niix")
    subprocess.run([tool, "-o", nifti, "-f", "v", folder], check=True, capture_output=True)
    (path,) = nifti.glob("*.nii*")
    image: Any = nibabel.load(path)
    # NIfTI is RAS and dcm2niix flips rows: the first pixel of a slice is the last row's.
    corners = [(image.affine @ [0, image.shape[1] - 1, k, 1])[:3] * [-1, -1, 1] for k in range(image.shape[2])]
    dx, dy, dz = image.header.get_zooms()[:3]
    return np.array(corners), np.array([dy, dx], dtype=np.float64), float(dz)
