"""Commit: one driver at a time turns staged latents into manifest rows.

Safety rests on three things, in this order: a snapshot's name is put once, so of two drivers only one can make version
n; the lease keeps a second driver from starting at all; and a snapshot names only files that are already durable. On a
file system the first holds by itself. On an object store without conditional puts the lease must: it is read back
before and after every commit, and a driver that lost it stops; one that was stopped between looking and putting may
still replace a snapshot, which both drivers notice: the replaced driver's commit is reported as failed, and
the other, when it next commits or ends, puts its snapshot back. infra/docs/store-guarantees.md says what is left to
chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import pyarrow as pa

from latentcache.checks import load_encoding
from latentcache.errors import StoreError
from latentcache.lease import Lease, log
from latentcache.records import LatentRecord, PairRecord, SeriesRecord
from latentcache.shard import SHARD, Layout
from latentcache.storage import Location
from latentcache.tables import (
    COLUMNS,
    DROPPED,
    KeyIndex,
    Kind,
    Snapshot,
    extend,
    load_snapshot,
    read_table,
    snapshot_path,
    timings_table,
    to_table,
    without_latents,
)


class Follower(Protocol):
    """Whatever shows the store to its user and follows what a writer commits."""

    def attach(self, writer: Writer) -> None: ...

    def detach(self, writer: Writer) -> None: ...

    def advance(self, snapshot: Snapshot) -> None: ...


class Writer:
    """The single committing driver, as a context manager that holds the lease."""

    def __init__(self, location: Location, follower: Follower) -> None:
        self._location = location
        self._follower = follower
        self._lease = Lease(location)
        self._index: KeyIndex | None = None
        self._added: set[tuple[str, str, str]] = set()
        self._encodings: set[str] = set()
        self._base: Snapshot | None = None
        self._committed: Snapshot | None = None
        """The last snapshot that this driver committed itself."""

    def __enter__(self) -> Writer:
        self._lease.acquire()
        try:
            self._follower.attach(self)
        except BaseException:
            self._lease.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._follower.detach(self)
        try:
            if error is None and not self._lease.exclusive and self._lease.held():
                self._restore_base()
        finally:
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
        after = self.replace(lambda base: without_latents(self._location, base, stale["path"]))
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
            self._base = load_snapshot(self._location)
        return self._base

    def _known(self) -> KeyIndex:
        if self._index is None:
            self._index = KeyIndex(read_table(self._location, self._current(), "manifest", COLUMNS))
        return self._index

    def _check_bytes(self, record: LatentRecord) -> None:
        if record.encode_key not in self._encodings:  # it never changes: asked once, not with every latent
            load_encoding(self._location, record.encode_key)
            self._encodings.add(record.encode_key)
        path = f"{record.path}/{SHARD}"
        try:
            size = self._location.size(path)
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
            self._put(extend(self._location, base, added))

    def _confirm(self, snapshot: Snapshot) -> None:
        """After a commit that the store itself may not have guarded: it counts only if the lease held until it stood.

        Raises:
            StoreError: Another driver took over meanwhile, so that one of the two snapshots replaced the other.
        """
        self._lease.check()
        if self._location.read(snapshot_path(snapshot.number)) != snapshot.to_json():
            raise StoreError(
                f"snapshot {snapshot.number} was replaced by another driver's",
                expected="one committing driver at a time",
                remedy="Stop the other command, then run this one again: it resumes from what is committed.",
            )

    def _restore_base(self) -> None:
        """Put this driver's last snapshot back where a driver that had lost the lease replaced it a moment too late.

        That driver finds the lease gone and reports its commit as failed (see ``_confirm``); ours was reported as done.
        """
        if self._lease.exclusive or self._committed is None:
            return
        path, data = snapshot_path(self._committed.number), self._committed.to_json()
        try:
            if self._location.read(path) in (data, DROPPED):
                return  # as it was, or expired or forgotten since
        except FileNotFoundError:
            return
        log.warning("snapshot %d was replaced by a driver without the lease: put back", self._committed.number)
        self._location.put(path, data)

    def _put(self, snapshot: Snapshot) -> None:
        self._lease.check()
        self._restore_base()
        try:
            self._location.put_once(snapshot_path(snapshot.number), [snapshot.to_json()])
        except FileExistsError as error:
            raise StoreError(
                f"snapshot {snapshot.number} was committed by another driver",
                expected="one committing driver at a time",
                remedy="Stop the other command, then run this one again: it resumes from what is committed.",
            ) from error
        if not self._lease.exclusive:
            self._confirm(snapshot)
        self._base = self._committed = snapshot
        self._follower.advance(snapshot)
