"""Ingesting: the store's own folder is left out, a cluster is used where one is named, a dry run writes nothing."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from pipeline.engines import EngineOptions
from pipeline.ingest import IngestOptions
from pipeline.workflows import IngestJob, ingest_dataset


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    module = importlib.import_module("pipeline.ingest")
    monkeypatch.setattr(module, "ingest", lambda *given: calls.append(given), raising=False)
    return calls


def test_a_dry_run_without_a_store_makes_none(tmp_path: Path, asked: list[Any]) -> None:
    store = tmp_path / "store"
    ingest_dataset(IngestJob(str(tmp_path), str(store), IngestOptions(dry_run=True)))
    assert not store.exists()
    dataset, opened, hidden, options, _ = asked[0]
    assert dataset == str(tmp_path)
    assert opened is None
    assert hidden is None
    assert options.exclude_folders == (store,)


@pytest.mark.parametrize(
    ("engine", "used"),
    [
        (EngineOptions("inline"), False),
        (EngineOptions("dask"), False),
        (EngineOptions("dask", scheduler="tcp://host:8786"), True),
        (EngineOptions("ray"), True),
    ],
)
def test_a_cluster_is_used_where_one_is_named(
    tmp_path: Path, asked: list[Any], engine: EngineOptions, used: bool
) -> None:
    ingest_dataset(IngestJob(str(tmp_path), str(tmp_path / "s"), IngestOptions(dry_run=True), engine=engine))
    assert (asked[0][3].cluster is engine) is used
