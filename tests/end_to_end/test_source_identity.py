"""An archive that changes between ingest and encode never gives another series under the same key."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentcache import InputError, LatentRecord, LatentStore
from latentcache.maintenance import stale_rows, verify
from pipeline.encode import EncodeSettings, encode_store, store as stage_of_encoding
from pipeline.encode.store import EncodeSummary
from pipeline.engines import EngineOptions
from pipeline.reading import read_series
from tests.pipeline.ingest.test_ingest import Bench
from tests.support.average_codec import AverageCodec
from tests.support.hospital import Scan, study, thick, thin, write_zip

TISSUE, NEWCOMER = 40, 190


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    monkeypatch.setattr(stage_of_encoding, "load_encoder", lambda device, settings: AverageCodec())
    return Bench(tmp_path)


def phase(uid: str, hu: int, n: int = 60) -> Scan:
    """One cardiac phase: a lattice that all phases of the study share, and tissue of one value."""
    image = np.full((n, 16, 16), hu, np.int16) + np.random.default_rng(hu).integers(-9, 9, (n, 16, 16), np.int16)
    return Scan(uid, n=n, spacing=1.0, image=image)


def loose(folder: Path, scan: Scan) -> None:
    folder.mkdir(parents=True)
    for i, data in enumerate(scan.files()):
        (folder / f"I{i:04d}.dcm").write_bytes(data)


def encode(bench: Bench, **options: Any) -> EncodeSummary:
    return encode_store(bench.url, EncodeSettings(), EngineOptions("inline"), **options)


def latents(bench: Bench) -> dict[str, LatentRecord]:
    store = LatentStore.open(bench.url)
    return {row.key: row for row in store.records()}


def hu_of(bench: Bench, row: LatentRecord) -> float:
    """What the average codec kept, in HU of the window 40 +- 200."""
    return float(LatentStore.open(bench.url).read(row)[0].mean()) * 200 + 40


def test_a_newcomer_in_a_patients_folder_is_not_taken_for_the_series_that_was_ingested(bench: Bench) -> None:
    """A second phase whose folder sorts first shifts every member's number to the newcomer's slices."""
    patient = bench.data / "APE" / "P1"
    loose(patient / "p75", phase("1.2.3.75", TISSUE))
    bench.run()
    key = bench.private.keys.series("1.2.3.75")
    loose(patient / "p30", phase("1.2.3.30", NEWCOMER))
    summary = encode(bench)
    assert (summary.committed, list(summary.failed)) == (0, [key])
    assert "60 of 60 slices are of another series now" in summary.failed[key]
    assert "ctpipe ingest" in summary.failed[key]
    assert latents(bench) == {}
    bench.run()
    assert (encode(bench).committed, encode(bench).failed) == (2, {})
    rows, series = latents(bench), bench.series()
    for uid, hu in (("1.2.3.75", TISSUE), ("1.2.3.30", NEWCOMER)):
        row = rows[bench.private.keys.series(uid)]
        assert hu_of(bench, row) == pytest.approx(hu, abs=2)
        assert row.source_digest == series[row.key].source_digest
    assert verify(LatentStore.open(bench.url)).ok


def test_two_series_that_change_places_in_a_zip_do_not_change_keys(bench: Bench) -> None:
    path = bench.data / "APE" / "a.zip"
    one, other = phase("1.2.3.75", TISSUE), phase("1.2.3.30", NEWCOMER)
    write_zip(path, [one, other])
    bench.run()
    write_zip(path, [other, one])
    summary = encode(bench)
    assert (summary.committed, len(summary.failed)) == (0, 2)
    assert all("of another series now" in why for why in summary.failed.values())
    bench.run()
    assert encode(bench).committed == 2
    found = {key: hu_of(bench, row) for key, row in latents(bench).items()}
    assert found[bench.private.keys.series("1.2.3.75")] == pytest.approx(TISSUE, abs=2)
    assert found[bench.private.keys.series("1.2.3.30")] == pytest.approx(NEWCOMER, abs=2)


def test_a_pair_is_not_refused_for_ever_because_its_archive_changed_once(bench: Bench) -> None:
    """The pixel proof compares what the headers paired, or nothing."""
    path = write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    bench.run()
    strange = [replace(scan, seed=scan.seed + 77) for scan in study("PAT1", 3)]
    write_zip(path, strange)
    summary = encode(bench)
    assert summary.committed == 0
    assert all("not the files that were ingested" in why for why in summary.failed.values())
    (pair,) = bench.store.pairs()
    assert pair.status == "ok"
    assert "pixel_proof" not in pair.evidence


def test_the_same_uids_with_other_pixels_are_refused_in_a_zip(bench: Bench) -> None:
    """A corrected export keeps every UID and every size; the directory's CRC-32 tells."""
    path = write_zip(bench.data / "APE" / "a.zip", [thin()])
    bench.run()
    before = path.stat()
    write_zip(path, [replace(thin(), seed=5)])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (why,) = encode(bench).failed.values()
    assert "its slices are not the files that were ingested" in why


def test_the_same_uids_with_other_times_are_refused_in_a_folder(bench: Bench) -> None:
    patient = bench.data / "APE" / "P1"
    loose(patient / "s", phase("1.2.3.75", TISSUE))
    bench.run()
    shutil.rmtree(patient)
    loose(patient / "s", phase("1.2.3.75", NEWCOMER))
    (why,) = encode(bench).failed.values()
    assert "its slices are not the files that were ingested" in why


def test_a_file_that_changes_while_it_is_read_is_noticed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    patient = bench.data / "APE" / "P1"
    loose(patient / "s", phase("1.2.3.75", TISSUE, n=4))
    bench.run()
    pointer = bench.private.pointer(bench.private.keys.series("1.2.3.75"))
    victim = sorted((patient / "s").iterdir())[2]
    from pipeline.reading import series, volume_reader

    headers = series.read_instances

    def then_changed(*args: Any) -> Any:
        found = headers(*args)
        victim.write_bytes(phase("1.2.3.75", NEWCOMER, n=4).file(2))
        return found

    monkeypatch.setattr(volume_reader, "read_instances", then_changed)
    with pytest.raises(InputError, match="changed while it was read"):
        read_series(pointer)


def test_an_ingest_that_died_between_private_and_catalog_gives_no_row(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PRIVATE knows the new archive and the catalog the old one: neither may vouch for the other."""
    path = write_zip(bench.data / "APE" / "a.zip", [thin()])
    bench.run()
    write_zip(path, [replace(thin(), seed=5)])

    def dies(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(bench.store), "append_catalog", dies)
    with pytest.raises(KeyboardInterrupt):
        bench.run()
    monkeypatch.undo()
    monkeypatch.setattr(stage_of_encoding, "load_encoder", lambda device, settings: AverageCodec())
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    (why,) = encode(bench).failed.values()
    assert "not the one that the catalog describes" in why
    bench.run()
    summary = encode(bench)
    assert (summary.committed, summary.failed) == (1, {})
    assert stale_rows(LatentStore.open(bench.url), summary.encode_key).num_rows == 0


def test_rows_of_private_that_an_earlier_version_wrote_still_read(bench: Bench) -> None:
    """They have no seal: the UID and the catalog's digest are what is left to hold an archive to."""
    import pyarrow.parquet as pq

    path = write_zip(bench.data / "APE" / "a.zip", [thick(), thin()])
    bench.run()
    for fragment in Path(bench.url, "private", "series").iterdir():
        pq.write_table(pq.read_table(fragment).drop_columns(["seal"]), fragment)
    assert bench.private.pointer(bench.private.keys.series(thin().uid)).seal == ""
    write_zip(path, [thick(), replace(thin(), seed=5)])
    assert all("catalog describes" in why for why in encode(bench).failed.values())
    write_zip(path, [thick(), thin()])
    assert encode(bench).failed == {}
