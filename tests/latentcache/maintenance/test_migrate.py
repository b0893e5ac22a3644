"""A store of format version 1 becomes one of this version, whole, however often it is interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from latentcache import LatentStore, PairRecord, StoreError
from latentcache.maintenance import migrate, verify
from latentcache.storage import LocalLocation
from latentcache.tables import Snapshot
from tests.latentcache.test_store import ENCODING, key, series, stage


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A store with a generated one inside, turned back into format version 1."""
    root = tmp_path / "store"
    store = LatentStore.create(root, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    store.append_catalog(
        [series(1)], [PairRecord(key(9), key(1), key(2), "APE", key(3), key(4), (0.0, 1.0), "val", "{}")]
    )
    with store.writer() as writer:
        writer.commit([stage(store, 1)], [{"key": key(1), "s": 1}])
    store.generated(key(7), create=True)
    for folder in (root, root / "generated" / key(7)):
        _age(folder)
    return root


def _age(root: Path) -> None:
    for path in (root / "snapshots").iterdir():
        body = json.loads(path.read_bytes())
        body["format_version"] = 1
        path.write_text(json.dumps(body))
    header = json.loads((root / "store.json").read_bytes())
    (root / "store.json").write_text(json.dumps({**header, "format_version": 1}))
    dropped = {"manifest": ["compute_dtype", "device_kind"]}
    for kind in ("pairs", "timings", "catalog", "manifest"):
        columns = dropped.get(kind, [])
        for path in (root / kind).glob("*.parquet"):
            table = pq.read_table(path).drop_columns(columns)
            pq.write_table(table.replace_schema_metadata({"ctpipe.format_version": "1"}), path)


def assert_current(root: Path) -> None:
    store = LatentStore.open(root)
    assert store.series() == [series(1)]
    assert [(p.status, p.reason, p.pair_key) for p in store.pairs()] == [("ok", "", key(9))]
    assert store.table("timings").column("stage").to_pylist() == [""]
    store.read(store.records()[0])
    assert verify(store).ok
    assert verify(store.generated(key(7))).ok


def test_an_old_store_opens_after_migration(old: Path) -> None:
    with pytest.raises(StoreError, match="migrate"):
        LatentStore.open(old)
    assert migrate(LocalLocation(old)) == (1, 4)
    assert_current(old)
    assert migrate(LocalLocation(old)) == (2, 0)


@pytest.mark.parametrize("method", ["put_once", "put", "delete"])
def test_an_interrupted_migration_is_completed(old: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(BaseException):
        pass

    real = getattr(LocalLocation, method)
    for allowed in range(12):
        count = 0

        def limited(self: LocalLocation, path: str, *rest: object, allowed: int = allowed) -> None:
            nonlocal count
            count += not path.startswith("lease")
            if count > allowed and not path.startswith("lease"):
                raise Stop
            real(self, path, *rest)

        monkeypatch.setattr(LocalLocation, method, limited)
        try:
            migrate(LocalLocation(old))
        except Stop:
            continue
        finally:
            monkeypatch.undo()
        break
    migrate(LocalLocation(old))
    assert_current(old)


def test_what_cannot_be_migrated_is_refused(old: Path) -> None:
    location = LocalLocation(old)
    location.put("store.json", b'{"format_version": 9}')
    with pytest.raises(StoreError, match="newer"):
        migrate(location)
    for unknown in (b"-3", b"0"):  # version 0 was never released
        location.put("store.json", b'{"format_version": ' + unknown + b"}")
        with pytest.raises(StoreError, match="unknown"):
            migrate(location)
    with pytest.raises(StoreError, match="no readable"):
        migrate(LocalLocation(old / "elsewhere"))
    assert Snapshot(0).number == 0
