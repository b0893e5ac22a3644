"""Commit: one driver at a time turns staged latents into manifest rows.

Safety rests on three things, in this order: a snapshot's name is put once, so of two drivers only one can make version
n; the lease keeps a second driver from starting at all; and a snapshot names only files that are already durable. On a
file system the first holds by itself. On an object store without conditional puts the lease must: it is read back
before every commit, and a driver that lost it stops.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from latentcache.arrays import SHARD, Layout
from latentcache.compaction import extend, without_latents
from latentcache.errors import StoreError
from latentcache.index import COLUMNS, KeyIndex
from latentcache.location import Location
from latentcache.manifest import Snapshot, load_snapshot, read_table, snapshot_path
from latentcache.records import LatentRecord, PairRecord, SeriesRecord
from latentcache.schema import Kind, timings_table, to_table

if TYPE_CHECKING:
    from latentcache.store import LatentStore

log = logging.getLogger("ctpipe.commit")
LEASE = "lease.json"
LEASE_SECONDS = 60.0
CLOCK_SKEW_SECONDS = 60.0
"""An unrenewed lease this long past its end is dead whatever the clocks of the two machines say."""


@dataclass(frozen=True)
class LeaseRecord:
    """Who may commit, and until when (seconds since 1970). ``host`` and ``process`` are hashes, not names."""

    token: str
    host: str
    process: str
    expires: float

    @property
    def holder_is_dead(self) -> bool:
        """True only for a process of this very machine and process namespace that is no longer there."""
        return self.host == _host() and self.process != _process(int(self.process.split("-")[0]))

    @property
    def holder_is_alive(self) -> bool:
        return self.host == _host() and not self.holder_is_dead


def _host() -> str:
    """Differs between machines, boots and containers: process numbers mean the same only where it is equal."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = boot.read_text() + os.readlink("/proc/self/ns/pid") if boot.exists() else uuid.uuid4().hex
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _process(number: int) -> str:
    """The process number and its start time, so that a reused number is another process; empty if there is none."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] == "Z" else f"{number}-{fields[19]}"


class Lease:
    """The right to commit, renewed in the background until released."""

    def __init__(self, location: Location, seconds: float = LEASE_SECONDS) -> None:
        self.location = location
        self.seconds = seconds
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def current(self) -> LeaseRecord | None:
        """Who holds the lease now; None when nobody does."""
        try:
            data = self.location.read(LEASE)
        except FileNotFoundError:
            return None
        try:
            return LeaseRecord(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{LEASE} cannot be read",
                expected="the record of a committing driver",
                remedy=f"Make sure that no ctpipe command writes to this store, then delete {LEASE}.",
            ) from error

    def acquire(self) -> None:
        """Take the lease, waiting out a dead holder's remaining time.

        Raises:
            StoreError: A living driver holds it.
        """
        found = self.current()
        if found is not None:
            self._wait_for(found)
        self._write()
        # Two drivers may have found the lease free at once: the later write wins, and the loser sees it here.
        if not self._exclusive():
            time.sleep(min(1.0, self.seconds / 10))
        self.check()
        self._thread = threading.Thread(target=self._renew, name="ctpipe-lease", daemon=True)
        self._thread.start()

    def _exclusive(self) -> bool:
        """Whether a racing driver would be stopped by the store itself (exclusive links of a file system)."""
        return "://" not in self.location.url

    def _wait_for(self, found: LeaseRecord) -> None:
        seen = time.monotonic()
        while not (found.holder_is_dead or time.time() > found.expires + CLOCK_SKEW_SECONDS):
            if found.holder_is_alive or self.current() not in (found, None):
                raise StoreError(
                    "another ctpipe command is committing to this store",
                    expected="one committing driver at a time",
                    remedy="Let it end or stop it; its finished work is kept, and running the command again resumes.",
                )
            if time.monotonic() - seen > self.seconds or self.current() is None:
                return
            log.info("waiting for the lease of a driver that no longer renews it")
            time.sleep(min(1.0, self.seconds / 5))

    def _write(self) -> None:
        record = LeaseRecord(self.token, _host(), _process(os.getpid()), time.time() + self.seconds)
        self.location.put(LEASE, json.dumps(asdict(record)).encode())

    def _renew(self) -> None:
        while not self._stop.wait(self.seconds / 3):
            try:
                found = self.current()
                if found is None or found.token != self.token:
                    return  # taken over: check() says so at the next commit
                self._write()
            except (OSError, StoreError) as error:
                log.warning("the lease could not be renewed: %s", type(error).__name__)

    def check(self) -> None:
        """Raises StoreError if another driver has taken the lease."""
        found = self.current()
        if found is None or found.token != self.token:
            raise StoreError(
                "this driver's lease was taken over by another",
                expected="one committing driver at a time",
                remedy="Stop the other command, then run this one again: it resumes from what is committed.",
            )

    def release(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        found = self.current()
        if found is not None and found.token == self.token:
            self.location.delete(LEASE)


class Writer:
    """The single committing driver, as a context manager that holds the lease."""

    def __init__(self, store: LatentStore) -> None:
        self._store = store
        self._lease = Lease(store.location)
        self._index: KeyIndex | None = None
        self._added: set[tuple[str, str, str]] = set()
        self._base: Snapshot | None = None

    def __enter__(self) -> Writer:
        self._lease.acquire()
        try:
            self._store.attach(self)
        except BaseException:
            self._lease.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.detach(self)
        self._lease.release()

    def commit(self, records: Sequence[LatentRecord], timings: Sequence[Mapping[str, Any]] = ()) -> list[LatentRecord]:
        """Make staged latents visible in one new snapshot.

        A latent that is already committed keeps its first row; the later attempt becomes garbage for gc.

        Returns:
            The records that were committed, in order.

        Raises:
            StoreError: The lease is lost, bytes are missing, or the encoding is unknown. Nothing is committed.
        """
        base = self._current()
        fresh = []
        for record in records:
            identity = (record.encode_key, record.key, record.role)
            if identity in self._added or self._known().rows(record.key, record.role, record.encode_key):
                continue
            self._check_bytes(record)
            self._added.add(identity)
            fresh.append(record)
        try:
            self._publish(base, {"manifest": to_table("manifest", fresh), "timings": timings_table(timings)})
        except BaseException:
            self._added.difference_update((r.encode_key, r.key, r.role) for r in fresh)
            raise
        return fresh

    def append_catalog(self, series: Sequence[SeriesRecord], pairs: Sequence[PairRecord]) -> None:
        """Add or replace catalog and pair rows in one new snapshot."""
        tables: dict[Kind, pa.Table] = {"catalog": to_table("catalog", series), "pairs": to_table("pairs", pairs)}
        self._publish(self._current(), tables)

    def retire(self, stale: pa.Table) -> int:
        """Take manifest rows out in one new snapshot, so that their latents can be made anew; returns how many went.

        Older snapshots keep the rows and the bytes: runs pinned to them read on, and gc takes the bytes once no
        snapshot names them. Killed at any instant, the store holds all of the rows or none.

        Args:
            stale: Rows with a column ``path``, of the current snapshot.
        """
        before = self._current()
        if stale.num_rows == 0:
            return 0
        after = self.replace(lambda base: without_latents(self._store.location, base, stale["path"]))
        return before.rows("manifest") - after.rows("manifest")

    def replace(self, build: Any) -> Snapshot:
        """Publish the snapshot that ``build(base)`` makes: the primitive of compaction and of removing rows."""
        base = self._current()
        snapshot: Snapshot = build(base)
        self._put(snapshot)
        self._index, self._added = None, set()
        return snapshot

    def _current(self) -> Snapshot:
        if self._base is None:
            self._base = load_snapshot(self._store.location)
        return self._base

    def _known(self) -> KeyIndex:
        if self._index is None:
            self._index = KeyIndex(read_table(self._store.location, self._current(), "manifest", COLUMNS))
        return self._index

    def _check_bytes(self, record: LatentRecord) -> None:
        self._store.encoding(record.encode_key)
        path = f"{record.path}/{SHARD}"
        try:
            size = self._store.location.size(path)
        except FileNotFoundError:
            size = -1
        if size != Layout(record.shape).shard_bytes:
            raise StoreError(
                f"latent {record.key} {record.role} was staged, but its bytes are not all in the store",
                expected=f"{Layout(record.shape).shard_bytes} bytes",
                remedy="Make sure that workers and driver use the same store URL, then encode it again.",
            )

    def _publish(self, base: Snapshot, added: dict[Kind, pa.Table]) -> None:
        if any(table.num_rows for table in added.values()):
            self._put(extend(self._store.location, base, added))

    def _put(self, snapshot: Snapshot) -> None:
        self._lease.check()
        try:
            self._store.location.put_once(snapshot_path(snapshot.number), [snapshot.to_json()])
        except FileExistsError as error:
            raise StoreError(
                f"snapshot {snapshot.number} was committed by another driver",
                expected="one committing driver at a time",
                remedy="Stop the other command, then run this one again: it resumes from what is committed.",
            ) from error
        self._base = snapshot
        self._store.advance(snapshot)
