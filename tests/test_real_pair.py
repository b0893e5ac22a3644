"""The main job on a genuine scanner study: a head phantom scanned once, reconstructed at 5 mm and at 1 mm."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

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
    from latentcache.store import LatentStore

    store = LatentStore.open(study.store)
    by_key = {s.series_key: s for s in store.series()}
    (pair,) = store.pairs()
    assert (by_key[pair.thick_key].n_slices, by_key[pair.thin_key].n_slices) == (28, 140)
    assert pair.status == "ok"
    assert pair.category == "non-APE"
    assert json.loads(pair.evidence)["pixel_proof"]


def test_decoded_thin_latents_keep_the_source_geometry_and_lose_nothing(study: Study, tmp_path: Path) -> None:
    from latentcache.store import LatentStore
    from pipeline.hu import Window
    from pipeline.pairing import geometry_of
    from pipeline.private import PrivateStore
    from pipeline.vae import load_vae
    from pipeline.volume_reader import read_series

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
    written = slices(tmp_path / "out")
    with zipfile.ZipFile(thick) as part:
        sources = [pydicom.dcmread(part.open(name)) for name in part.namelist()]
    z = sorted(float(d.ImagePositionPatient[2]) for d in sources)
    assert len(written) == 140
    assert float(written[0].ImagePositionPatient[2]) == pytest.approx(z[0] - 2.0, abs=0.02)
    assert float(written[-1].ImagePositionPatient[2]) == pytest.approx(z[-1] + 2.0, abs=0.02)
    assert_valid(tmp_path / "out", len(written), tmp_path)


def assert_valid(folder: Path, n_slices: int, scratch: Path) -> None:
    """dciodvfy finds no error in any file, and dcm2niix makes one volume of the right shape and positions."""
    import nibabel

    files = sorted(folder.rglob("*.dcm"))
    bin_folder = Path(sys.executable).parent
    for path in files[:: max(1, len(files) // 8)]:
        said = subprocess.run([bin_folder / "dciodvfy", path], capture_output=True, text=True, check=False)
        errors = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]
        assert not errors, errors
    nifti = scratch / "nifti"
    nifti.mkdir()
    subprocess.run([bin_folder / "dcm2niix", "-o", nifti, "-f", "v", files[0].parent], check=True, capture_output=True)
    (image_path,) = nifti.glob("*.nii*")
    image: Any = nibabel.load(image_path)
    assert image.shape == (512, 512, n_slices)
    first = slices(folder)[0]
    # NIfTI is RAS and dcm2niix flips rows: the corner of the last row of the lowest slice.
    affine = image.affine
    corner = affine @ np.array([0, image.shape[1] - 1, 0, 1])
    np.testing.assert_allclose(
        [-corner[0], -corner[1], corner[2]], [float(v) for v in first.ImagePositionPatient], atol=1e-3
    )
