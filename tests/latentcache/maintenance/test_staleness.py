"""Archives that change after they were encoded: noticed, retired on request, never pulled from under a pinned run."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from cli.main import app
from diffusion.config import DataConfig
from diffusion.data import PairStream
from latentcache import LatentRecord, LatentStore
from latentcache.maintenance import collect, pair_digest, pair_digests, pin, stale_rows, verify
from latentcache.storage import FileSystem, LocalLocation
from pipeline.encode import store as stage_of_encoding
from pipeline.phantom import write_dataset
from tests.latentcache.maintenance.test_verify import age
from tests.latentcache.test_store import ENCODING, key, latent, series, stage
from tests.latentcache.test_writer import Crash, FailingDisk, lives
from tests.support.average_codec import AverageCodec
from tests.support.killed_writer import QuickDisk

__all__ = ["lives"]
KEY = ENCODING.encode_key
N_THIN = 46


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    """Three series under digest d; the catalog has since seen another archive of the second."""
    made = LatentStore.create(LocalLocation(tmp_path / "store", QuickDisk()), secret_fingerprint="f")
    made.register_encoding(ENCODING)
    made.append_catalog([series(n) for n in (1, 2, 3)])
    with made.writer() as writer:
        for n in (1, 2, 3):
            writer.commit([stage(made, n, latent(5, size=2, seed=n))])
    made.append_catalog([series(2, source_digest="another")])
    return made


def test_a_changed_source_makes_a_row_stale(store: LatentStore) -> None:
    assert stale_rows(store, KEY)["key"].to_pylist() == [key(2)]
    assert stale_rows(store, KEY, roles=("thick",)).num_rows == 0
    assert stale_rows(store, "0" * 16).num_rows == 0
    store.append_catalog([series(2, source_digest=""), series(3, source_digest="new", status="quarantined")])
    assert stale_rows(store, KEY).num_rows == 0  # nothing is known of the one, nothing would replace the other


def test_a_pairs_latent_depends_on_both_sources() -> None:
    assert len({pair_digest("a", "b"), pair_digest("b", "a"), pair_digest("a", "c")}) == 3
    assert pair_digest("", "b") == pair_digest("a", "") == ""
    columns = (pa.chunked_array([["a", "b", "", "a"]]), pa.chunked_array([["b", "a", "b", ""]]))
    assert pair_digests(*columns).to_pylist() == [pair_digest("a", "b"), pair_digest("b", "a"), "", ""]


def test_retired_rows_stay_in_older_snapshots_until_gc_may_take_them(store: LatentStore) -> None:
    before = store.snapshot
    old = store.records()
    pin(store.location, "run", before)
    with store.writer() as writer:
        assert writer.retire(stale_rows(store, KEY)) == 1
        assert writer.retire(stale_rows(store, KEY)) == 0
        fresh = stage(store, 2, latent(5, size=2, seed=9), source_digest="another")
        assert writer.commit([fresh]) == [fresh]
    assert [r.key for r in store.records()] == [key(1), key(3), key(2)]
    assert store.find(key(2), "thin") == fresh
    root = Path(store.url)
    age(root, 25)
    collect(store, expire_snapshots=True)
    pinned = LatentStore.open(store.url, snapshot=before)
    assert pinned.records() == old
    np.testing.assert_array_equal(pinned.read(old[1]), latent(5, size=2, seed=2))
    assert verify(pinned).problems == []
    (root / "pins" / "run.json").unlink()
    age(root, 25)
    assert collect(LatentStore.open(store.url), expire_snapshots=True).attempts == 1
    assert not (root / old[1].path).exists()
    np.testing.assert_array_equal(store.read(fresh), latent(5, size=2, seed=9))
    assert verify(LatentStore.open(store.url)).problems == []


def refresh(root: Path, disk: FileSystem) -> None:
    """What `ctpipe encode --refresh` does to the store; may be repeated."""
    store = LatentStore.open(LocalLocation(root, disk))
    with store.writer() as writer:
        writer.retire(stale_rows(store, KEY))
        if store.find(key(2), "thin") is None:
            writer.commit([stage(store, 2, latent(5, size=2, seed=9), source_digest="another")])


@pytest.mark.parametrize(("after", "odds"), [(False, 0.0), (True, 1.0)])
def test_a_crash_at_every_file_operation_of_a_refresh(
    store: LatentStore, tmp_path: Path, lives: Callable[[], None], after: bool, odds: float
) -> None:
    """Whole or not at all; the snapshot before always reads; repeating it completes it."""
    before = store.records()

    def life(at: int) -> FailingDisk:
        lives()
        disk = FailingDisk(at=at, after=after, graveyard=tmp_path / f"graves{at}")
        shutil.copytree(store.url, tmp_path / f"{at}")
        return disk

    disk = life(-1)
    refresh(tmp_path / "-1", disk)
    assert disk.count > 20
    for at in range(disk.count):
        disk, root = life(at), tmp_path / f"{at}"
        with pytest.raises(Crash):
            refresh(root, disk)
        disk.lose(odds, at)
        found = LatentStore.open(root)
        assert {r.key for r in found.records()} >= {key(1), key(3)}
        assert verify(found).problems == []
        assert LatentStore.open(root, snapshot=store.snapshot).records() == before
        lives()
        refresh(root, QuickDisk())
        again = LatentStore.open(root)
        assert [(r.key, r.source_digest) for r in sorted(again.records(), key=lambda r: r.key)] == [
            (key(1), "d"), (key(2), "another"), (key(3), "d"),
        ]  # fmt: skip
        assert LatentStore.open(root, snapshot=store.snapshot).records() == before
        collect(again, grace_s=-60)
        assert verify(again).problems == []
        shutil.rmtree(root)


def ctpipe(*words: object) -> tuple[int, dict[str, object]]:
    import json

    done = CliRunner().invoke(app, [*map(str, words), "--json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return int(done.return_value), json.loads(done.stdout)


def test_encode_says_what_is_stale_and_makes_it_anew_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    monkeypatch.setattr(stage_of_encoding, "load_encoder", lambda device, settings: AverageCodec())
    data, url = tmp_path / "data", tmp_path / "store"
    write_dataset(data, patients=1, size=32, n_thin=N_THIN, seed=3)
    encode = ("encode", url, "--engine", "inline")
    ctpipe("ingest", data, url)
    code, first = ctpipe(*encode)
    assert (code, first["committed"], first["stale"]) == (0, 3, 0)
    opened = LatentStore.open(url)
    pinned, old = opened.snapshot, by_role(opened)
    pin(opened.location, "run", pinned)

    change_a_pixel_of_the_thin_series(next(data.rglob("*.zip")))
    ctpipe("ingest", data, url)
    code, said = ctpipe(*encode)
    assert (code, said["stale"], said["retired"], said["committed"]) == (3, 2, 0, 0)
    assert by_role(LatentStore.open(url)) == old
    stream = PairStream(LatentStore.open(url), DataConfig(), split="all")
    assert len(stream.pairs) == 0
    assert [n for reason, n in stream.left_out.items() if "changed" in reason] == [1]

    assert ctpipe(*encode, "--refresh", "--dry-run")[1]["stale"] == 2
    code, done = ctpipe(*encode, "--refresh")
    assert (code, done["stale"], done["retired"], done["committed"]) == (0, 0, 2, 2)
    new = by_role(LatentStore.open(url))
    assert new["thick"] == old["thick"]
    assert all(new[r].source_digest != old[r].source_digest for r in ("thin", "thick_on_thin"))
    assert new["thin"].sha256 != old["thin"].sha256
    assert len(PairStream(LatentStore.open(url), DataConfig(), split="all").pairs) == 1

    still = LatentStore.open(url, snapshot=pinned)
    assert by_role(still) == old
    assert len(PairStream(still, DataConfig(), split="all").pairs) == 1
    assert verify(still).problems == []
    assert ctpipe(*encode)[0] == 0


def by_role(store: LatentStore) -> dict[str, LatentRecord]:
    return {r.role: r for r in store.records()}


def change_a_pixel_of_the_thin_series(path: Path) -> None:
    """One row of one slice: the archive a scanner might send again after a correction."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    folders: dict[str, list[str]] = {}
    for name in members:
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    chosen = sorted(max(folders.values(), key=len))[3]
    data = bytearray(members[chosen])
    for offset in range(len(data) - 32 * 32, len(data) - 32 * 31, 2):
        data[offset] ^= 16  # a row in the middle, where tissue is
    members[chosen] = bytes(data)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
