"""A zip with the real thick series and two thin ones of different kernels; and a thick series of another scan."""

from __future__ import annotations

import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scipy.ndimage import gaussian_filter

from pipeline.archive import open_archive
from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.pairing import prove_pair
from pipeline.reading import pointer_of, read_series, scan
from pipeline.volume import Volume

pytestmark = pytest.mark.real
PAIR = Path("ape-layout", "non-APE", "head-phantom.zip")


def volumes(path: Path) -> list[Volume]:
    source = open_archive(path)
    try:
        found = [read_series(pointer_of(one)) for one in scan(source).series if one.role_hint != "other"]
    finally:
        source.close()
    return sorted(found, key=lambda volume: len(volume.hu))


def with_second_kernel(path: Path, out: Path, uid: str) -> None:
    """Copy the zip, adding its thin series once more, unsharp-masked, with another kernel and series UID."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            if name.endswith("/"):
                continue
            data = source.read(name)
            target.writestr(name, data)
            if name.startswith("2/"):
                ds = pydicom.dcmread(io.BytesIO(data))
                pixels = ds.pixel_array.astype(np.float32)
                sharp = np.clip(pixels + 2 * (pixels - gaussian_filter(pixels, 1.0)), 0, 4095)
                ds.PixelData = sharp.astype(ds.pixel_array.dtype).tobytes()
                ds.ConvolutionKernel, ds.SeriesInstanceUID = "YC", uid
                ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{ds.SOPInstanceUID}.7"
                copy = io.BytesIO()
                ds.save_as(copy)
                target.writestr(f"3/{name[2:]}", copy.getvalue())


def test_the_real_thick_series_takes_the_thin_one_of_its_kernel(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    (tmp_path / "non-APE").mkdir()
    uid = "1.2.826.0.1.3680043.8.498.1"
    with_second_kernel(real_data / PAIR, tmp_path / "non-APE" / "three.zip", uid)
    store, private = open_stores(str(tmp_path / "store"))
    summary = ingest(str(tmp_path), store, private, IngestOptions(exclude_folders=(tmp_path / "store",)))
    assert summary.series == {"thick": 1, "thin": 2}
    (pair,) = store.pairs()
    kernels = {row.series_key: row.kernel for row in store.series()}
    assert (kernels[pair.thick_key], kernels[pair.thin_key]) == ("UB", "UB")
    assert pair.thin_key != private.keys.series(uid)


def test_a_thick_series_of_another_scan_is_refused_whatever_its_header_says(real_data: Path) -> None:
    thick, thin = volumes(real_data / PAIR)
    (other,) = volumes(real_data / "odd" / "gantry-tilt-philips.zip")
    forged = replace(thick, hu=np.ascontiguousarray(other.hu[13:41]))
    proof = prove_pair(forged, thin)
    assert not proof.ok
    assert "does not average to the thick one" in proof.reason
