"""Zips on an S3 server that overwrites, breaks off and goes away."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentcache import InputError
from pipeline.archive import StorageError, object_store as archive_s3, open_archive
from pipeline.archive.discover import discover
from pipeline.ingest import IngestOptions, ingest, open_stores
from tests.support.hospital import study, write_zip
from tests.support.s3_server import S3Server, serve


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def server(running: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    yield running
    running.fault = lambda number, method, path: ""


def test_an_overwrite_of_equal_size_and_time_is_read_again(server: S3Server, tmp_path: Path) -> None:
    where = "s3://bucket/overwritten"
    ballast = [("video.mp4", np.random.default_rng(0).bytes(4000))]
    path = write_zip(server.root / "overwritten" / "APE" / "a.zip", study("PAT1", 3), extra=ballast)
    os.utime(path, (1e9, 1e9))
    store, private = open_stores(str(tmp_path / "store"))
    assert ingest(where, store, private, IngestOptions()).archives == {"new": 1}
    (found,), before = discover(where), {row.series_key: row.source_digest for row in store.series()}
    other = write_zip(tmp_path / "other.zip", [replace(scan, seed=77) for scan in study("PAT1", 3)]).read_bytes()
    spare = path.stat().st_size - len(other)
    path.write_bytes(other[:-2] + struct.pack("<H", spare) + b"-" * spare)
    os.utime(path, (1e9, 1e9))
    (again,) = discover(where)
    assert (again.size, again.mtime_ns) == (found.size, found.mtime_ns)
    assert ingest(where, store, private, IngestOptions()).archives == {"changed": 1}
    after = {row.series_key: row.source_digest for row in store.series()}
    assert {key for key in before if before[key] == after[key]} == set()


def test_one_zip_is_a_dataset_and_an_empty_prefix_is_none(server: S3Server) -> None:
    path = write_zip(server.root / "alone" / "APE" / "a.zip", study("PAT1", 5))
    (found,) = discover("s3://bucket/alone/APE/a.zip")
    assert (found.url, found.size, found.category) == ("s3://bucket/alone/APE/a.zip", path.stat().st_size, "APE")
    assert found.etag == discover("s3://bucket/alone")[0].etag
    for nothing in ("s3://bucket/nowhere", "s3://bucket/alone/APE/b.zip"):
        with pytest.raises(InputError, match=r"dataset does not exist|cannot be opened"):
            discover(nothing)


def test_an_answer_that_breaks_off_is_asked_for_again(server: S3Server) -> None:
    path = write_zip(server.root / "flaky" / "a.zip", study("PAT1", 6))
    source = open_archive("s3://bucket/flaky/a.zip")
    server.fault = lambda number, method, path: "cut" if number % 2 else ""
    whole = [source.read(member.index) for member in source.members()]
    with zipfile.ZipFile(path) as archive:
        assert whole == [archive.read(info) for info in archive.infolist()]
    assert server.seen["cut"] > 0


def test_a_store_that_goes_away_counts_against_no_archive(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is what was known of an archive lost, nor is it taken for broken for ever."""
    monkeypatch.setattr(archive_s3, "READ_ATTEMPTS", 1)
    where = "s3://bucket/away"
    for name, number in (("a", 7), ("b", 8)):
        write_zip(server.root / "away" / f"{name}.zip", study(f"PAT{number}", number))
    store, private = open_stores(str(tmp_path / "store"))
    ingest(where, store, private, IngestOptions())
    write_zip(server.root / "away" / "b.zip", [*study("PAT8", 8), *study("PAT9", 9)])
    server.fault = lambda number, method, path: "cut" if method == "GET" and path.endswith("b.zip") else ""
    summary = ingest(where, store, private, IngestOptions())
    assert (summary.archives, summary.pairs) == ({"changed": 1, "unchanged": 1}, 2)
    assert [item.kind for item in summary.set_aside] == ["archive"]
    assert "object store failed to answer" in summary.set_aside[0].reason
    server.fault = lambda number, method, path: ""
    summary = ingest(where, store, private, IngestOptions())
    assert (summary.archives, summary.pairs, summary.set_aside) == ({"changed": 1, "unchanged": 1}, 3, [])


def test_an_object_that_is_not_there_is_named_as_such(server: S3Server) -> None:
    with pytest.raises(StorageError, match="cannot be opened"):
        open_archive("s3://bucket/nothing.zip")


def test_folders_with_special_characters_are_what_the_listing_says(server: S3Server, tmp_path: Path) -> None:
    """Read as parts of a URL, they would name another folder, without a word."""
    for number, folder in enumerate(("APE#1", "50%20", "why?", "plain", "a b=c&d")):
        write_zip(server.root / "special" / folder / "a.zip", study(f"P{number}", 20 + number))
    found = discover("s3://bucket/special")
    assert len({open_archive(one.url).digest for one in found}) == 5
    store, private = open_stores(str(tmp_path / "store"))
    summary = ingest("s3://bucket/special", store, private)
    assert (summary.pairs, summary.archives) == (5, {"new": 5})


def test_what_an_object_store_cannot_give_is_listed(server: S3Server, tmp_path: Path) -> None:
    write_zip(server.root / "mixed" / "APE" / "a.zip", study("PAT1", 3))
    for name in ("APE/b.7z", "APE/p1/I1", "APE/p1/I2.dcm", "APE/p2/1/I1.IMA", "README", "APE/list.csv"):
        (server.root / "mixed" / name).parent.mkdir(parents=True, exist_ok=True)
        (server.root / "mixed" / name).write_bytes(b"x")
    reasons = {one.url.removeprefix("s3://bucket/mixed/"): one.refusal for one in discover("s3://bucket/mixed")}
    assert reasons.pop("APE/a.zip") == ""
    assert "not read (7z)" in reasons.pop("APE/b.7z")
    assert reasons.pop("APE/p1").startswith("2 loose files in an object store")
    assert reasons.pop("APE/p2").startswith("1 loose files in an object store")
    assert reasons == {}
    store, private = open_stores(str(tmp_path / "store"))
    summary = ingest("s3://bucket/mixed", store, private)
    assert summary.archives == {"new": 1, "unusable": 3}
    assert len(summary.set_aside) == 3
    assert ingest("s3://bucket/mixed", store, private).archives == {"unchanged": 4}
