"""Thin-only archives become pairs whose thick series was never scanned, and everything says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from latentcache import LatentStore
from pipeline.identity import PrivateStore
from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.ingest.summary import IngestSummary
from pipeline.reading import read_series
from pipeline.volume import SIMULATED_FLAG
from pipeline.workflows.evaluate import pairs_of
from tests.support.dicom_files import anatomy, series_files, zip_of

OPTIONS = IngestOptions(simulate_thick_mm=5.0, batch=4)


@pytest.fixture(scope="module")
def catalogued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, IngestSummary]:
    root = tmp_path_factory.mktemp("thin-only")
    data = root / "data"
    data.mkdir()
    files = series_files(anatomy(40), z=range(40), thickness=1.0)
    zip_of(data / "thin.zip", files)
    both = series_files(anatomy(40), z=range(40), thickness=1.0, series="1.2.3.1", study="1.2.3", frame="1.2.9")
    both += series_files(anatomy(8), z=range(2, 40, 5), series="1.2.3.2", study="1.2.3", frame="1.2.9")
    zip_of(data / "both.zip", both)
    return root / "store", ingest(str(data), *open_stores(str(root / "store")), OPTIONS)


def test_only_the_study_without_a_thick_series_gets_one(catalogued: tuple[Path, IngestSummary]) -> None:
    store = LatentStore.open(str(catalogued[0]))
    pairs = store.pairs()
    assert sorted(pair.simulated for pair in pairs) == [False, True]
    series = {one.series_key: one for one in store.series()}
    (pair,) = (one for one in pairs if one.simulated)
    assert SIMULATED_FLAG in series[pair.thick_key].flags
    assert SIMULATED_FLAG not in series[pair.thin_key].flags
    assert sum(SIMULATED_FLAG in one.flags for one in series.values()) == 1


def test_the_summary_counts_them_apart(catalogued: tuple[Path, IngestSummary]) -> None:
    summary = catalogued[1]
    assert (summary.pairs, summary.simulated_pairs) == (2, 1)
    assert "1, 1 more simulated" in summary.text()


def test_it_is_made_when_it_is_read(catalogued: tuple[Path, IngestSummary]) -> None:
    url = str(catalogued[0])
    store, people = LatentStore.open(url), PrivateStore.open(url)
    (pair,) = (one for one in store.pairs() if one.simulated)
    thick, thin = (read_series(people.pointer(key)) for key in (pair.thick_key, pair.thin_key))
    (record,) = (one for one in store.series() if one.series_key == pair.thick_key)
    assert thick.hu.shape == record.shape_zyx
    assert thick.geometry.z_mm == pytest.approx(record.z_mm)
    assert SIMULATED_FLAG in thick.flags
    assert thick.hu.mean() == pytest.approx(thin.hu.mean(), abs=10)
    again = read_series(people.pointer(pair.thick_key))
    np.testing.assert_array_equal(thick.hu, again.hu)


def test_figures_of_real_pairs_never_hold_simulated_ones() -> None:
    def pair(key: str, simulated: bool) -> SimpleNamespace:
        return SimpleNamespace(pair_key=key, split="test", status="ok", simulated=simulated)

    def store(*pairs: SimpleNamespace) -> SimpleNamespace:
        records = [SimpleNamespace(key=one.pair_key) for one in pairs]
        return SimpleNamespace(pairs=lambda: pairs, records=lambda key, role: records)

    real, made = pair("a", False), pair("b", True)
    assert pairs_of(store(real, made), "e", "test", None)[0] == [real]
    assert pairs_of(store(made), "e", "test", None)[0] == [made]
