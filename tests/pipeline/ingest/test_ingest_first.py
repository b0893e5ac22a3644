"""Two ingests that make the same store at once, and places that cannot be made: an order or an error in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentcache import InputError, LatentStore, StoreError
from latentcache.storage import LocalLocation
from latentcache.store import Header
from pipeline.identity import PrivateStore
from pipeline.ingest import open_stores


def test_of_two_first_ingests_the_earlier_secret_and_store_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    url = str(tmp_path / "store")
    put_once = LocalLocation.put_once
    first: list[PrivateStore] = []

    def raced(self: LocalLocation, path: str, buffers: object) -> None:
        if path == "secret" and not first:
            first.append(PrivateStore.open(url, create=True))
        if path == "store.json" and not LatentStore.exists(url):
            monkeypatch.setattr(LocalLocation, "put_once", put_once)
            open_stores(url)
        put_once(self, path, buffers)  # type: ignore[arg-type]

    first_call: list[None] = []

    def once(self: LocalLocation, path: str, buffers: object) -> None:
        if path == "secret" and not first_call:
            first_call.append(None)
            monkeypatch.setattr(LocalLocation, "put_once", put_once)
            first.append(PrivateStore.open(url, create=True))
            monkeypatch.setattr(LocalLocation, "put_once", raced)
        put_once(self, path, buffers)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalLocation, "put_once", once)
    store, private = open_stores(url)
    assert private.secret == first[0].secret
    assert store.secret_fingerprint == private.fingerprint
    assert open_stores(url)[1].secret == private.secret


def test_a_store_json_that_is_a_folder_is_said(tmp_path: Path) -> None:
    (tmp_path / "store" / "store.json").mkdir(parents=True)
    with pytest.raises(StoreError, match="cannot be read"):
        Header.read(LocalLocation(tmp_path / "store"))


def test_a_private_part_that_cannot_be_made_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="private part cannot be made"):
        open_stores(str(tmp_path / "file" / "store"))


def test_a_question_that_cannot_be_written_down_is_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    _, private = open_stores(str(tmp_path / "store"))

    def refused(*args: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("pipeline.identity.private_store.OwnerOnlyFiles.write", refused)
    with pytest.raises(StoreError, match="cannot be written to"):
        private.log_whois("a" * 16, True)
