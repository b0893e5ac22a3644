"""Archives, store and private part all on an S3 server: read by ranges, never downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.reading import read_series
from tests.support.hospital import study, thin, write_zip
from tests.support.s3_server import S3Server, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with serve(tmp_path_factory.mktemp("s3")) as running:
        yield running


def test_ingest_from_s3_to_s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    ballast = np.random.default_rng(0).bytes(1 << 20)
    write_zip(server.root / "data" / "APE" / "a.zip", study("PAT1", 3), extra=[("video.mp4", ballast)])
    (server.root / "data" / "APE" / "b.zip").write_bytes(b"no zip")
    store, private = open_stores("s3://bucket/store", "s3://bucket/private")
    summary = ingest("s3://bucket/data", store, private, IngestOptions())
    assert (summary.pairs, summary.categories) == (1, {"APE": 1})
    assert [item.key for item in summary.set_aside] == [private.keys.archive("s3://bucket/data/APE/b.zip")]
    volume = read_series(private.pointer(private.keys.series("1.2.3.1")))
    np.testing.assert_array_equal(volume.hu[3], thin(seed=3)._pixels(3))
    again = open_stores("s3://bucket/store", "s3://bucket/private")
    assert ingest("s3://bucket/data", *again, IngestOptions()).archives == {"unchanged": 2}
    assert not (server.root / "store" / "private").exists()


def test_both_parts_lie_where_they_were_put(server: S3Server) -> None:
    files = {str(path.relative_to(server.root)) for path in Path(server.root).rglob("*") if path.is_file()}
    assert "private/secret" in files
    assert any(name.startswith("store/catalog/") for name in files)
