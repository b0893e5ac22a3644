"""Series of uneven spacing: set aside by default, sampled at even positions on request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from pydicom import Dataset

from latentcache import LatentStore, SeriesRecord
from pipeline.identity import PrivateStore
from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.reading import read_series
from pipeline.volume import RESAMPLED_FLAG, Geometry, even_geometry
from tests.support.hospital import Scan, thin, write_zip

Z_MM = (0.0, 5.0, 10.0, 15.0, 22.5, 30.0)
"""A head protocol in two steps."""


def geometry_at(z_mm: list[float], shear: float = 0.0) -> Geometry:
    """A lattice at these heights, its slices shifted along y by ``shear`` a millimetre."""
    step = float(np.mean(np.diff(z_mm)))
    rows = ((0.0, 0.0, 1.0, -8.0), (shear * step, 1.0, 0.0, -8.0), (step, 0.0, 0.0, z_mm[0]), (0.0, 0.0, 0.0, 1.0))
    return Geometry((len(z_mm), 16, 16), rows, tuple(z_mm), 5.0)


@given(
    start=st.floats(-500, 500),
    steps=st.lists(st.sampled_from([1.0, 2.5, 3.0, 5.0, 7.5]), min_size=2, max_size=40),
    shear=st.floats(-0.4, 0.4),
)
def test_even_positions_keep_both_ends_and_the_shear(start: float, steps: list[float], shear: float) -> None:
    geometry = geometry_at(list(start + np.cumsum([0.0, *steps])), shear)
    even = even_geometry(geometry)
    assert even.shape_zyx[0] == len(even.z_mm)
    assert np.ptp(np.diff(even.z_mm)) < 1e-6
    # The extent is half a step at most from a whole number of median steps.
    assert abs(even.spacing_mm_zyx[0] / float(np.median(steps)) - 1) <= 0.5 / (len(even.z_mm) - 1) + 1e-6
    for mine, theirs in ((0, 0), (-1, -1)):
        ours = even.slice_position(range(len(even.z_mm))[mine])
        assert ours == pytest.approx(geometry.slice_position(range(len(geometry.z_mm))[theirs]), abs=1e-6)


def uneven(uid: str = "1.2.3.5") -> Scan:
    """A thick series at ``Z_MM`` whose HU are 10 a millimetre, so that linear interpolation is exact."""
    hu = np.array(Z_MM)[:, None, None] * 10 + np.zeros((16, 16))

    def place(ds: Dataset) -> None:
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], Z_MM[int(ds.InstanceNumber) - 1]]

    return Scan(uid, n=len(Z_MM), spacing=5.0, edit=place, image=hu.astype(np.int16))


def ingested(root: Path, **options: bool) -> tuple[LatentStore, PrivateStore, SeriesRecord]:
    store, private = open_stores(str(root / "store"))
    ingest(str(root / "data"), store, private, IngestOptions(workers=1, **options))
    store = LatentStore.open(store.url)
    (record,) = [r for r in store.series() if "variable-spacing" in r.flags]
    return store, private, record


def test_uneven_series_is_set_aside_and_taken_on_request(tmp_path: Path) -> None:
    fine = replace(thin(), n=31, image=np.tile(np.arange(31)[:, None, None] * 10, (1, 16, 16)).astype(np.int16))
    write_zip(tmp_path / "data" / "APE" / "a.zip", [uneven(), fine])
    store, _, record = ingested(tmp_path)
    assert (record.role, record.status) == ("other", "ok")
    assert "resampled only on request" in record.reason
    assert not [p for p in store.pairs() if p.status == "ok"]

    store, private, record = ingested(tmp_path, resample_variable_spacing=True, rescan=True)
    assert (record.role, record.reason, record.n_slices) == ("thick", "", 7)
    assert RESAMPLED_FLAG in record.flags
    assert record.z_mm == pytest.approx((0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0))
    (pair,) = [p for p in store.pairs() if p.status == "ok"]
    assert pair.thick_key == record.series_key

    volume = read_series(private.pointer(record.series_key))
    assert volume.geometry.z_mm == pytest.approx(record.z_mm)
    assert volume.hu.shape == (7, 16, 16)
    assert volume.hu[:, 3, 4] == pytest.approx(np.array(record.z_mm) * 10, abs=1e-3)
    assert RESAMPLED_FLAG in volume.flags
    assert [uid.rpartition(".")[2] for uid in volume.header.sop_instance_uids] == ["1", "2", "3", "4", "5", "5", "6"]

    _, private, record = ingested(tmp_path, rescan=True)
    assert record.role == "other"
    assert len(read_series(private.pointer(record.series_key)).hu) == len(Z_MM)
