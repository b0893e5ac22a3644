"""The SQLite file under the queue: its tables, and transactions that are synced before they return."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentcache import StoreError

log = logging.getLogger("ctpipe.serve")


SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE studies (
    study_key TEXT PRIMARY KEY, state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', rule TEXT NOT NULL DEFAULT '',
    first_at REAL NOT NULL, last_at REAL NOT NULL, unfinished INTEGER NOT NULL DEFAULT 1,
    grown INTEGER NOT NULL DEFAULT 0, attempts INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0,
    done_at REAL);
CREATE INDEX studies_by_state ON studies (state, last_at);
CREATE TABLE instances (
    sop_key TEXT PRIMARY KEY, study_key TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL,
    calling_ae TEXT NOT NULL, received_at REAL NOT NULL, committed INTEGER NOT NULL DEFAULT 0,
    kept INTEGER NOT NULL DEFAULT 1) WITHOUT ROWID;
CREATE INDEX instances_by_study ON instances (study_key);
CREATE TABLE results (
    study_key TEXT NOT NULL, revision INTEGER NOT NULL, source_digest TEXT NOT NULL, folders TEXT NOT NULL,
    series_uid TEXT NOT NULL, n_slices INTEGER NOT NULL, rule TEXT NOT NULL, received_at REAL NOT NULL,
    made_at REAL NOT NULL, seconds REAL NOT NULL, kept INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (study_key, revision)) WITHOUT ROWID;
CREATE TABLE deliveries (
    study_key TEXT NOT NULL, revision INTEGER NOT NULL, destination TEXT NOT NULL, state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, refusals INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '', delivered_at REAL,
    PRIMARY KEY (study_key, revision, destination)) WITHOUT ROWID;
CREATE INDEX deliveries_by_state ON deliveries (destination, state, next_at);
CREATE TABLE watched (item_key TEXT PRIMARY KEY, stamp TEXT NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE commitments (
    id INTEGER PRIMARY KEY, transaction_uid TEXT NOT NULL, calling_ae TEXT NOT NULL, items TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, next_at REAL NOT NULL DEFAULT 0,
    UNIQUE (transaction_uid, calling_ae));
CREATE TABLE counters (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
"""


class Database:
    """One connection, safe to use from several threads; one process at a time writes."""

    def __init__(self, path: Path, *, read_only: bool = False, clock: Callable[[], float] = time.time) -> None:
        """Open or make the file. Raises StoreError where it is damaged, or of a newer version."""
        self._lock = threading.RLock()
        self._counted: Counter[str] = Counter()
        self._read_only = read_only
        self.clock = clock
        if not read_only and str(path) != ":memory:" and not path.exists():
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
        target = f"file:{path}?mode=ro" if read_only else str(path)
        try:
            self._db = sqlite3.connect(target, uri=read_only, check_same_thread=False, isolation_level=None, timeout=30)
            self._db.row_factory = sqlite3.Row
            if not read_only:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = FULL")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            if version == 0 and not read_only:
                self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
                version = SCHEMA_VERSION
        except sqlite3.DatabaseError as error:
            raise StoreError(
                f"a queue that cannot be opened ({type(error).__name__})",
                expected="the queue that this service made",
                remedy="Restore it from a backup, or move the state folder away and let the senders send again.",
            ) from None
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"a queue of version {version}",
                expected=f"version {SCHEMA_VERSION}",
                remedy="Use the version of ctpipe that wrote it.",
            )

    def close(self) -> None:
        self.flush_counters()
        with self._lock:
            self._db.close()

    def count(self, name: str, by: float = 1) -> None:
        """Add to a counter, in memory at first: a flood of refusals must not cost a synced write each."""
        with self._lock:
            self._counted[name] += by  # type: ignore[assignment]

    def flush_counters(self) -> None:
        """Write what was counted; where the disk is full it is kept for the next time."""
        with self._lock:
            if self._read_only or not self._counted:
                return
            try:
                with self._change() as db:
                    for name, by in self._counted.items():
                        add_to_counter(db, name, by)
            except sqlite3.OperationalError as error:
                log.warning("counters could not be written (%s)", type(error).__name__)
            else:
                self._counted.clear()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            try:
                self._db.execute("COMMIT")
            except sqlite3.Error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(query, values).fetchall()


def add_to_counter(db: sqlite3.Connection, name: str, by: float) -> None:
    """Add to a counter, which begins at zero."""
    db.execute(
        "INSERT INTO counters VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        (name, by),
    )
