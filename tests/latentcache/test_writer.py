"""The commit protocol under crashes: at every file operation in turn, with lost writes, and under SIGKILL."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentcache import LatentRecord, LatentStore, Lease, StoreError, lease
from latentcache.lease import LEASE, LeaseRecord
from latentcache.maintenance import collect, verify
from latentcache.storage import FileSystem, LocalLocation
from tests.support.killed_writer import ENCODING, QuickDisk, latent, stage
from tests.support.kills import kill_writers

KEYS = [f"{n:016x}" for n in range(3)]


class Crash(BaseException):
    """The power went. Not an Exception, so that no handler swallows it."""


@dataclass
class FailingDisk(QuickDisk):
    """Counts changes, dies before, within or after number ``at``, and can forget what was not fsynced."""

    at: int = -1
    after: bool = False
    count: int = 0
    dead: bool = False
    graveyard: Path = Path()
    undo: list[tuple[Path, Callable[[], object]]] = field(default_factory=list)

    def _step(self, action: Callable[[], None], partial: Callable[[], object] = lambda: None) -> None:
        if self.dead:
            raise Crash
        number, self.count = self.count, self.count + 1
        if number == self.at and not self.after:
            self.dead = True
            partial()
            raise Crash
        try:
            action()
        finally:
            if number == self.at:
                self.dead = True
                raise Crash

    def _keep(self, path: Path) -> Path:
        self.graveyard.mkdir(exist_ok=True)
        kept = self.graveyard / f"{len(list(self.graveyard.iterdir()))}"
        os.link(path, kept)
        return kept

    def write(self, path: Path, buffers: Sequence[Any]) -> None:
        def act() -> None:
            QuickDisk.write(self, path, buffers)
            self.undo.append((path.parent, lambda: path.unlink(missing_ok=True)))

        self._step(act, partial=lambda: path.write_bytes(bytes(memoryview(buffers[0]).cast("B")[:3])))

    def link(self, source: Path, target: Path) -> None:
        def act() -> None:
            FileSystem.link(self, source, target)
            self.undo.append((target.parent, lambda: target.unlink(missing_ok=True)))

        self._step(act)

    def replace(self, source: Path, target: Path) -> None:
        def act() -> None:
            kept = self._keep(target) if target.exists() else None
            FileSystem.replace(self, source, target)

            def back() -> None:
                target.unlink(missing_ok=True)
                if kept:
                    os.link(kept, target)

            self.undo.append((target.parent, back))

        self._step(act)

    def unlink(self, path: Path) -> None:
        def act() -> None:
            if path.exists():
                kept = self._keep(path)
                FileSystem.unlink(self, path)
                self.undo.append((path.parent, lambda: path.parent.is_dir() and os.link(kept, path)))

        self._step(act)

    def mkdir(self, path: Path) -> None:
        def act() -> None:
            FileSystem.mkdir(self, path)
            self.undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))

        self._step(act)

    def rmdir(self, path: Path) -> None:
        def act() -> None:
            FileSystem.rmdir(self, path)
            self.undo.append((path.parent, lambda: path.mkdir(exist_ok=True)))

        self._step(act)

    def fsync_folder(self, path: Path) -> None:
        def act() -> None:
            self.undo = [(folder, back) for folder, back in self.undo if folder != path]

        self._step(act)

    def lose(self, odds: float, seed: int) -> None:
        """Changes of folders that were not fsynced vanish, each folder's with the given odds."""
        chance = random.Random(seed)
        lost = {folder for folder in sorted({f for f, _ in self.undo}) if chance.random() < odds}
        for folder, back in reversed(self.undo):
            if folder in lost and folder.is_dir():
                back()


def work(root: Path, disk: FileSystem, acknowledged: list[LatentRecord]) -> None:
    """Everything a store goes through, resumable: create, catalog, stage, commit, an abandoned attempt, gc."""
    location = LocalLocation(root, disk)
    if LatentStore.exists(location):
        store = LatentStore.open(location)
    else:
        store = LatentStore.create(location, secret_fingerprint="f")
    store.register_encoding(ENCODING)
    with store.writer() as writer:
        for batch in (KEYS[:1], KEYS[1:]):
            missing = [k for k in batch if store.find(k, "thin") is None]
            acknowledged += writer.commit([stage(store, k) for k in missing], [{"key": k, "s": 1.0} for k in missing])
    stage(store, KEYS[0])  # a zombie's attempt, never committed
    collect(store, grace_s=-60)


def assert_sound(root: Path, acknowledged: Sequence[LatentRecord]) -> None:
    """No row without whole bytes; no committed row lost."""
    store = LatentStore.open(root)
    rows = store.records()
    assert set(acknowledged) <= set(rows)
    for row in rows:
        np.testing.assert_array_equal(store.read(row), latent(row.key))


def operations(tmp: Path) -> int:
    disk = FailingDisk(graveyard=tmp / "graves")
    tmp.mkdir()
    work(tmp / "store", disk, [])
    return disk.count


@pytest.fixture
def lives(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Each call makes this process look like the next one: the lease of the one before is a dead process's."""
    life = [0]
    monkeypatch.setattr(lease, "_process", lambda number: f"{number}-{life[0]}")

    def next_life() -> None:
        life[0] += 1

    return next_life


@pytest.mark.parametrize(
    ("after", "odds"),
    [
        (False, 0.0),
        (True, 1.0),
        pytest.param(True, 0.0, marks=pytest.mark.slow),
        pytest.param(True, 0.5, marks=pytest.mark.slow),
    ],
)
def test_a_crash_at_every_file_operation(tmp_path: Path, lives: Callable[[], None], after: bool, odds: float) -> None:
    total = operations(tmp_path / "count")
    assert total > 100
    for at in range(total):
        lives()
        root = tmp_path / f"{at}" / "store"
        root.parent.mkdir()
        disk = FailingDisk(at=at, after=after, graveyard=tmp_path / f"{at}" / "graves")
        acknowledged: list[LatentRecord] = []
        with pytest.raises(Crash):
            work(root, disk, acknowledged)
        disk.lose(odds, at)
        if acknowledged:
            assert_sound(root, acknowledged)
        lives()
        work(root, QuickDisk(), acknowledged)
        assert_sound(root, acknowledged)
        if at % 5 == 0:
            assert_clean(root)
        shutil.rmtree(tmp_path / f"{at}")


def assert_clean(root: Path) -> None:
    """Every key once, nothing that verify objects to, and no orphan that gc left."""
    store = LatentStore.open(root)
    assert sorted(r.key for r in store.records()) == KEYS
    result = verify(store)
    assert result.problems == []
    assert result.orphans == 0
    assert not list(root.rglob(".aside-*"))


@dataclass
class FullDisk(QuickDisk):
    """Room for so many more bytes; a write that does not fit leaves what did, as the kernel does."""

    room: int

    def write(self, path: Path, buffers: Sequence[Any]) -> None:
        data = b"".join(bytes(memoryview(b).cast("B")) for b in buffers)
        path.write_bytes(data[: max(self.room, 0)])
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def mkdir(self, path: Path) -> None:
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        FileSystem.mkdir(self, path)


def test_a_full_disk_leaves_a_whole_store_and_the_run_resumes(tmp_path: Path) -> None:
    """Full at thirty points of a run: the error says what to do, nothing half-written stays, a retry completes."""

    def fresh(name: str) -> Path:
        LatentStore.create(tmp_path / name, secret_fingerprint="f").register_encoding(ENCODING)
        return tmp_path / name

    enough = FullDisk(1 << 30)
    work(fresh("enough"), enough, [])
    total = (1 << 30) - enough.room
    for point in range(30):  # the last a thirtieth short: rows hold times, whose length varies by some bytes
        room = total * point // 30
        root, disk = fresh(f"{room}"), FullDisk(room)
        acknowledged: list[LatentRecord] = []
        with pytest.raises(StoreError, match="no space left") as caught:
            work(root, disk, acknowledged)
        assert "room for" in caught.value.expected
        assert "resumes" in caught.value.remedy
        assert_sound(root, acknowledged)
        assert not list(root.rglob(".aside-*"))
        assert verify(LatentStore.open(root)).problems == []
        disk.room = 1 << 30
        work(root, disk, acknowledged)
        assert_sound(root, acknowledged)
        assert_clean(root)
        shutil.rmtree(root)


@pytest.mark.parametrize("stores", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_random_kills(tmp_path: Path, stores: int) -> None:
    """200 SIGKILLs a store: nothing acknowledged is lost, no row lacks bytes, gc spares what is in flight."""
    for seed in range(stores):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        found = kill_writers(folder, 200, seed)
        assert found.sound, found
        assert found.rows >= found.acknowledged > 10
        shutil.rmtree(folder)


def test_a_living_driver_is_not_disturbed(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    with store.writer():
        other = LatentStore.open(store.url)
        with pytest.raises(StoreError, match="another ctpipe command"), other.writer():
            pass
        with pytest.raises(StoreError, match="another ctpipe command"):
            other.append_catalog([])
        with pytest.raises(StoreError, match="being written"):
            store.attach(store.writer())
    with other.writer():
        pass
    assert not (Path(store.url) / LEASE).exists()


def test_a_foreign_lease_is_taken_over_only_when_nobody_renews_it(tmp_path: Path) -> None:
    location = LocalLocation(tmp_path)
    foreign = LeaseRecord("t", "another host", "1-1", time.time() + 0.3)
    holder = Lease(location, seconds=0.3)
    location.put(LEASE, _json(foreign))
    waiting = Lease(location, seconds=0.3)
    waiting.acquire()
    waiting.check()
    with pytest.raises(StoreError, match="taken over"):
        holder.check()
    waiting.release()
    assert waiting.current() is None
    location.put(LEASE, _json(LeaseRecord("t", "another host", "1-1", time.time() - 1000)))
    waiting = Lease(location)
    waiting.acquire()
    waiting.release()


def test_a_driver_that_renews_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = LocalLocation(tmp_path)
    monkeypatch.setattr(lease, "_host", lambda: "another host")
    holder = Lease(location, seconds=0.6)
    holder.acquire()
    monkeypatch.undo()
    with pytest.raises(StoreError, match="another ctpipe command"):
        Lease(location, seconds=0.6).acquire()
    holder.check()
    holder.release()


def test_a_driver_that_lost_its_lease_commits_nothing(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    store.register_encoding(ENCODING)
    with store.writer() as writer:
        store.location.put(LEASE, _json(LeaseRecord("thief", "another host", "1-1", time.time() + 60)))
        with pytest.raises(StoreError, match="taken over"):
            writer.commit([stage(store, KEYS[0])])
    assert LatentStore.open(store.url).records() == []
    assert (tmp_path / "store" / LEASE).exists()  # the thief's, not ours to remove


def test_of_two_drivers_only_one_makes_a_version(tmp_path: Path) -> None:
    store = LatentStore.create(tmp_path / "store", secret_fingerprint="f")
    store.register_encoding(ENCODING)
    other = LatentStore.open(store.url)
    with store.writer() as writer:
        writer.commit([stage(store, KEYS[0])])
        (tmp_path / "store" / LEASE).unlink()
        with other.writer() as rival:
            rival.commit([stage(store, KEYS[1])])
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "store" / LEASE).unlink()
        store.location.put(LEASE, _json(LeaseRecord(writer._lease.token, "h", "1-1", time.time() + 60)))
        with pytest.raises(StoreError, match="committed by another"):
            writer.commit([stage(store, KEYS[2])])
    assert sorted(r.key for r in LatentStore.open(store.url).records()) == KEYS[:2]


def _json(record: LeaseRecord) -> bytes:
    import json
    from dataclasses import asdict

    return json.dumps(asdict(record)).encode()
