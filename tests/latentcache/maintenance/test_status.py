"""``ctpipe status``: the tiling of every encoding, and how far a job is, with Ray's dashboard where there is one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.main import app
from latentcache import LatentStore
from pipeline.engines import EngineOptions, Progress, dashboard_of, read_progress, watched
from pipeline.vae import Tiling
from tests.latentcache.test_store import ENCODING


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return LatentStore.create(tmp_path / "store", secret_fingerprint="f")


def status(store: LatentStore) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CliRunner().invoke(app, ["status", store.url, "--json"]).stdout)
    return found


def text(store: LatentStore) -> str:
    return CliRunner().invoke(app, ["status", store.url]).stdout


def test_every_encoding_says_how_it_was_tiled(store: LatentStore) -> None:
    exact = store.register_encoding(ENCODING)
    slid = store.register_encoding(replace(ENCODING, extra=Tiling((64, 64, 64), 0.4).to_extra()))
    found = status(store)["encodings"]
    assert (found[exact]["tiling"], found[slid]["tiling"]) == ("exact", "sliding")
    lines = text(store).splitlines()
    for key, tiling in ((exact, "exact"), (slid, "sliding")):
        (number,) = [n for n, line in enumerate(lines) if line.startswith(f"encode key {key}")]
        assert f"tiling {tiling}" in lines[number + 1]


def test_a_job_says_how_far_it_is_and_where_rays_dashboard_is(store: LatentStore) -> None:
    encoding = Progress(store.location, "0" * 16, planned=10)
    encoding.note(attempted=4, committed=11)
    assert "encode 4 of 10" in text(store)
    assert "dashboard" not in text(store)
    sampling = Progress(store.location, "0" * 16, planned=5, stage="sample", dashboard=lambda: "http://head:8265")
    sampling.note(attempted=1, committed=1)
    # Of two jobs on one store the one that spoke last is shown.
    assert "sample 1 of 5" in text(store)
    assert "Ray's dashboard: http://head:8265" in text(store)
    sampling.end()
    assert status(store)["running"]["stage"] == "encode"
    encoding.end()
    assert read_progress(store.location) is None


def test_the_dashboard_is_the_one_of_the_cluster_that_this_job_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = SimpleNamespace(get_dashboard_url=lambda: "10.0.0.1:8265")
    there = SimpleNamespace(is_initialized=lambda: True, _private=SimpleNamespace(worker=worker))
    monkeypatch.setitem(sys.modules, "ray", there)
    ask = dashboard_of(EngineOptions("ray", ray_address="auto"))
    assert ask() == "http://10.0.0.1:8265"
    assert dashboard_of(EngineOptions("dask"))() is None
    worker.get_dashboard_url = lambda: ""  # a cluster without one
    assert ask() is None
    there.is_initialized = lambda: False
    assert ask() is None


def test_items_are_counted_as_they_come(store: LatentStore) -> None:
    items = watched(iter("abc"), Progress(store.location, "0" * 16, planned=3, stage="decode"))
    said = [text(store).splitlines()[0] for _ in items]
    assert [line.split(",")[0] for line in said] == [f"decode {n} of 3" for n in (1, 2, 3)]
    assert "3 series done" in said[-1]
    assert status(store)["running"] is None


def test_a_store_that_cannot_be_written_stops_no_job(
    store: LatentStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def refuse(path: str, data: bytes) -> None:
        asked.append(path)
        raise PermissionError(path)

    monkeypatch.setattr(store.location, "put", refuse)
    assert list(watched(range(5), Progress(store.location, "0" * 16, planned=5, stage="decode"))) == list(range(5))
    assert asked == ["progress-decode.json"], "asked once, and said once"
    assert len(caplog.records) == 1


def test_what_an_older_version_left_is_shown(store: LatentStore) -> None:
    old = {"stage": "encode", "encode_key": "0" * 16, "planned": 9, "attempted": 3, "latents": 7, "started": 0.0}
    store.location.put("progress.json", json.dumps({**old, "updated": 1.0}).encode())
    assert "encode 3 of 9" in text(store)
    assert "7 latents committed" in text(store)
