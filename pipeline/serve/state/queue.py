"""The queue and the state of every study, in one SQLite file: what is in it survives a kill at any instant.

Every change is one transaction, synced before it returns. The file holds keys, figures and reasons; identifiers only
where a storage commitment must be answered with them, so it is part of the private folder (mode 0600).

States of a study: ``receiving`` (waiting until it is quiet), ``working``, ``retry`` (failed, will be tried again),
``sending``, ``done``, ``skipped`` (no rule selects it), ``held`` (grew after its last result), ``quarantined``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.serve.state.database import Database, add_to_counter

STATES = ("receiving", "working", "retry", "sending", "done", "skipped", "held", "quarantined")


@dataclass(frozen=True)
class Claim:
    """A study to work on: ``attempt`` counts from 1; ``revision`` is that of the result it would get."""

    study_key: str
    attempt: int
    revision: int


@dataclass(frozen=True)
class Made:
    """A finished result as the queue records it."""

    source_digest: str
    folders: tuple[str, ...]
    series_uid: str
    n_slices: int
    rule: str
    seconds: float


@dataclass(frozen=True)
class Delivery:
    """A result to send to one destination; ``attempt`` counts from 1."""

    study_key: str
    revision: int
    destination: str
    folders: tuple[str, ...]
    attempt: int
    refusals: int


@dataclass(frozen=True)
class Stored:
    """An instance that the queue knows; ``kept`` says whether its file is still there."""

    study_key: str
    digest: str
    kept: bool


class Queue(Database):
    """The SQLite file. Safe to use from several threads; one process at a time writes."""

    # -- what comes in ------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """Take up after a stop or a kill: work begun is to do again, and every quiet period begins anew.

        While we were away nobody could send, so silence in that time says nothing.
        """
        now = self.clock()
        with self._change() as db:
            db.execute("UPDATE studies SET state = 'retry', next_at = ? WHERE state = 'working'", (now,))
            db.execute("UPDATE studies SET last_at = ? WHERE state = 'receiving'", (now,))
            db.execute("UPDATE deliveries SET state = 'waiting', next_at = ? WHERE state = 'sending'", (now,))

    def stored(self, sop_key: str) -> Stored | None:
        """Return what is known of an instance, None where it never came."""
        rows = self._rows("SELECT study_key, digest, kept FROM instances WHERE sop_key = ?", (sop_key,))
        return Stored(rows[0]["study_key"], rows[0]["digest"], bool(rows[0]["kept"])) if rows else None

    def add_instance(self, sop_key: str, study_key: str, digest: str, size: int, calling_ae: str) -> None:
        """Record an instance whose file is durable. From here on it will not be lost, and the sender may know.

        A study that had been finished, skipped, held or quarantined is received again: it grew. One in work is
        marked, and looked at again when the work is done.
        """
        now = self.clock()
        with self._change() as db:
            db.execute(
                "INSERT INTO instances (sop_key, study_key, digest, size, calling_ae, received_at)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (sop_key, study_key, digest, size, calling_ae, now),
            )
            self._touch(db, study_key, now)
            add_to_counter(db, "instances_received", 1)
            add_to_counter(db, "bytes_received", size)

    def restore_instance(self, sop_key: str, study_key: str) -> None:
        """Record that the file of a known instance, deleted after its time, is there again."""
        with self._change() as db:
            db.execute("UPDATE instances SET kept = 1 WHERE sop_key = ?", (sop_key,))
            db.execute(
                "UPDATE studies SET state = 'receiving', last_at = ?, attempts = 0"
                " WHERE study_key = ? AND state IN ('quarantined', 'held', 'receiving')",
                (self.clock(), study_key),
            )

    def _touch(self, db: sqlite3.Connection, study_key: str, now: float) -> None:
        db.execute(
            "INSERT INTO studies (study_key, state, first_at, last_at) VALUES (?, 'receiving', ?, ?)"
            " ON CONFLICT (study_key) DO UPDATE SET last_at = excluded.last_at, unfinished = 1,"
            " grown = CASE WHEN state = 'working' THEN 1 ELSE grown END,"
            " attempts = CASE WHEN state = 'working' THEN attempts ELSE 0 END,"
            " first_at = CASE WHEN state IN ('receiving', 'working') THEN first_at ELSE excluded.first_at END,"
            " state = CASE WHEN state = 'working' THEN 'working' ELSE 'receiving' END",
            (study_key, now, now),
        )

    def sender_finished(self, study_keys: Sequence[str]) -> None:
        """Note that whoever sent these studies has finished with them: a short quiet period is enough now."""
        with self._change() as db:
            db.executemany(
                "UPDATE studies SET unfinished = 0, last_at = ? WHERE study_key = ? AND state = 'receiving'",
                [(self.clock(), key) for key in study_keys],
            )

    def study_size(self, study_key: str) -> tuple[int, int]:
        """Return instances and bytes of a study."""
        (row,) = self._rows(
            "SELECT COUNT(*) AS n, COALESCE(SUM(size), 0) AS size FROM instances WHERE study_key = ?", (study_key,)
        )
        return int(row["n"]), int(row["size"])

    def spool_bytes(self) -> int:
        """Return the bytes of all images kept."""
        (row,) = self._rows("SELECT COALESCE(SUM(size), 0) AS size FROM instances WHERE kept = 1")
        return int(row["size"])

    def instances(self, study_key: str) -> list[sqlite3.Row]:
        """Return sop_key, digest, calling_ae and kept of every instance of a study."""
        return self._rows(
            "SELECT sop_key, digest, calling_ae, kept FROM instances WHERE study_key = ? ORDER BY sop_key", (study_key,)
        )

    def known_files(self) -> set[tuple[str, str]]:
        """Return (study key, instance key) of every file that must be there."""
        rows = self._rows("SELECT study_key, sop_key FROM instances WHERE kept = 1")
        return {(row["study_key"], row["sop_key"]) for row in rows}

    def known_results(self) -> set[tuple[str, str]]:
        """Return (study key, revision) of every result whose files must be there."""
        rows = self._rows("SELECT study_key, revision FROM results WHERE kept = 1")
        return {(row["study_key"], str(row["revision"])) for row in rows}

    # -- work ---------------------------------------------------------------------------------------------------

    def claim(self, quiet_s: float, unfinished_quiet_s: float) -> Claim | None:
        """Take the next study that is quiet or due, and count the attempt before any work is done.

        Args:
            quiet_s: Silence needed where the sender finished.
            unfinished_quiet_s: Silence needed where it broke off, or keeps its association open.
        """
        now = self.clock()
        with self._change() as db:
            row = db.execute(
                "SELECT study_key, attempts FROM studies WHERE"
                " (state = 'receiving' AND last_at + CASE unfinished WHEN 1 THEN ? ELSE ? END <= ?)"
                " OR (state = 'retry' AND next_at <= ?) ORDER BY last_at LIMIT 1",
                (unfinished_quiet_s, quiet_s, now, now),
            ).fetchone()
            if row is None:
                return None
            key, attempt = row["study_key"], row["attempts"] + 1
            db.execute(
                "UPDATE studies SET state = 'working', attempts = ?, grown = 0, reason = '' WHERE study_key = ?",
                (attempt, key),
            )
            (last,) = db.execute("SELECT MAX(revision) FROM results WHERE study_key = ?", (key,)).fetchone()
        return Claim(key, attempt, (last or 0) + 1)

    def last_digest(self, study_key: str) -> str:
        """Return the source digest of a study's last result, empty where it has none."""
        rows = self._rows(
            "SELECT source_digest FROM results WHERE study_key = ? ORDER BY revision DESC LIMIT 1", (study_key,)
        )
        return str(rows[0]["source_digest"]) if rows else ""

    def made(self, claim: Claim, result: Made, destinations: Sequence[str]) -> None:
        """Record a result and what is to be delivered, in one step: a result is never made twice.

        Results of the same study that nobody has begun to send are superseded.
        """
        now = self.clock()
        with self._change() as db:
            (received,) = db.execute(
                "SELECT MAX(received_at) FROM instances WHERE study_key = ?", (claim.study_key,)
            ).fetchone()
            db.execute(
                "INSERT INTO results (study_key, revision, source_digest, folders, series_uid, n_slices, rule,"
                " received_at, made_at, seconds) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    claim.study_key, claim.revision, result.source_digest, json.dumps(result.folders),
                    result.series_uid, result.n_slices, result.rule, received or now, now, result.seconds,
                ),
            )  # fmt: skip
            db.execute(
                "UPDATE deliveries SET state = 'superseded' WHERE study_key = ? AND state = 'waiting' AND attempts = 0",
                (claim.study_key,),
            )
            db.executemany(
                "INSERT INTO deliveries (study_key, revision, destination, state) VALUES (?, ?, ?, 'waiting')",
                [(claim.study_key, claim.revision, name) for name in destinations],
            )
            add_to_counter(db, "results_made", 1)
            add_to_counter(db, "interpolation_seconds", result.seconds)
            self._settle(db, claim.study_key, result.rule)

    def unchanged(self, claim: Claim, rule: str) -> None:
        """Record that what came later does not change the series that was interpolated."""
        with self._change() as db:
            self._settle(db, claim.study_key, rule)

    def end(self, claim: Claim, state: str, reason: str) -> None:
        """Record that a study is ``skipped``, ``held`` or ``quarantined``, and why; new images open it again."""
        assert state in ("skipped", "held", "quarantined")
        with self._change() as db:
            db.execute(
                "UPDATE studies SET state = CASE WHEN grown THEN 'receiving' ELSE ? END, reason = ?, grown = 0,"
                " attempts = 0, done_at = ? WHERE study_key = ?",
                (state, reason, self.clock(), claim.study_key),
            )
            add_to_counter(db, f"studies_{state}", 1)

    def try_again(self, claim: Claim, after_s: float, reason: str) -> None:
        """Record that an attempt failed for a reason that may pass."""
        with self._change() as db:
            db.execute(
                "UPDATE studies SET state = 'retry', next_at = ?, reason = ? WHERE study_key = ?",
                (self.clock() + after_s, reason, claim.study_key),
            )

    def _settle(self, db: sqlite3.Connection, study_key: str, rule: str) -> None:
        """Put a study where its deliveries say it is, or back to receiving where it grew in the meantime."""
        (left,) = db.execute(
            "SELECT COUNT(*) FROM deliveries WHERE study_key = ? AND state IN ('waiting', 'sending', 'refused')",
            (study_key,),
        ).fetchone()
        db.execute(
            "UPDATE studies SET state = CASE WHEN grown THEN 'receiving' WHEN ? > 0 THEN 'sending' ELSE 'done' END,"
            " rule = ?, reason = '', grown = 0, attempts = 0, done_at = ? WHERE study_key = ?",
            (left, rule, self.clock(), study_key),
        )

    # -- delivery -----------------------------------------------------------------------------------------------

    def next_delivery(self, destination: str) -> Delivery | None:
        """Take the next result that is due at a destination."""
        now = self.clock()
        with self._change() as db:
            row = db.execute(
                "SELECT d.study_key, d.revision, d.attempts, d.refusals, r.folders FROM deliveries d"
                " JOIN results r USING (study_key, revision)"
                " WHERE d.destination = ? AND d.state = 'waiting' AND d.next_at <= ?"
                " ORDER BY d.next_at, r.made_at LIMIT 1",
                (destination, now),
            ).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE deliveries SET state = 'sending', attempts = attempts + 1"
                " WHERE study_key = ? AND revision = ? AND destination = ?",
                (row["study_key"], row["revision"], destination),
            )
        folders = tuple(json.loads(row["folders"]))
        return Delivery(row["study_key"], row["revision"], destination, folders, row["attempts"] + 1, row["refusals"])

    def delivered(self, delivery: Delivery) -> None:
        """Record that a destination acknowledged every file of a result."""
        now = self.clock()
        where = (delivery.study_key, delivery.revision, delivery.destination)
        with self._change() as db:
            db.execute(
                "UPDATE deliveries SET state = 'delivered', delivered_at = ?, reason = ''"
                " WHERE study_key = ? AND revision = ? AND destination = ?",
                (now, *where),
            )
            (received,) = db.execute(
                "SELECT received_at FROM results WHERE study_key = ? AND revision = ?", where[:2]
            ).fetchone()
            add_to_counter(db, "results_delivered", 1)
            add_to_counter(db, "latency_seconds", now - received)
            (left,) = db.execute(
                "SELECT COUNT(*) FROM deliveries WHERE study_key = ? AND state IN ('waiting', 'sending', 'refused')",
                (delivery.study_key,),
            ).fetchone()
            if not left:
                db.execute(
                    "UPDATE studies SET state = 'done', done_at = ?, reason = ''"
                    " WHERE study_key = ? AND state = 'sending'",
                    (now, delivery.study_key),
                )

    def undelivered(self, delivery: Delivery, after_s: float, reason: str, *, refused: bool, give_up: bool) -> None:
        """Record a failed delivery: tried again ``after_s`` later, or left to a person with ``give_up``."""
        with self._change() as db:
            db.execute(
                "UPDATE deliveries SET state = ?, next_at = ?, reason = ?, refusals = refusals + ?"
                " WHERE study_key = ? AND revision = ? AND destination = ?",
                (
                    "refused" if give_up else "waiting", self.clock() + after_s, reason, int(refused),
                    delivery.study_key, delivery.revision, delivery.destination,
                ),
            )  # fmt: skip
            add_to_counter(db, "deliveries_failed", 1)

    def requeue(self, study_key: str | None = None) -> int:
        """Try quarantined studies and refused deliveries again, one study's or all; return how many."""
        now, condition = self.clock(), "" if study_key is None else " AND study_key = ?"
        values = () if study_key is None else (study_key,)
        with self._change() as db:
            studies = db.execute(
                "UPDATE studies SET state = 'retry', next_at = ?, attempts = 0 WHERE state = 'quarantined'" + condition,
                (now, *values),
            ).rowcount
            sends = db.execute(
                "UPDATE deliveries SET state = 'waiting', next_at = ?, refusals = 0 WHERE state = 'refused'"
                + condition,
                (now, *values),
            ).rowcount
        return int(studies + sends)

    # -- upkeep -------------------------------------------------------------------------------------------------

    def expired(self, before: float) -> list[str]:
        """Return studies that ended before a time and whose files are still there."""
        rows = self._rows(
            "SELECT s.study_key FROM studies s WHERE s.state IN ('done', 'skipped') AND s.done_at < ?"
            " AND (EXISTS (SELECT 1 FROM instances i WHERE i.study_key = s.study_key AND i.kept AND NOT i.committed)"
            " OR EXISTS (SELECT 1 FROM results r WHERE r.study_key = s.study_key AND r.kept))",
            (before,),
        )
        return [row["study_key"] for row in rows]

    def forget_files(self, study_key: str, before: float) -> list[str] | None:
        """Record that a study's files are about to be deleted, and return the instances concerned.

        None where the study is in use again. Instances whose safekeeping was promised stay.
        """
        with self._change() as db:
            row = db.execute(
                "SELECT 1 FROM studies WHERE study_key = ? AND state IN ('done', 'skipped') AND done_at < ?",
                (study_key, before),
            ).fetchone()
            if row is None:
                return None
            rows = db.execute(
                "SELECT sop_key FROM instances WHERE study_key = ? AND kept AND NOT committed", (study_key,)
            ).fetchall()
            db.execute("UPDATE instances SET kept = 0 WHERE study_key = ? AND NOT committed", (study_key,))
            db.execute("UPDATE results SET kept = 0 WHERE study_key = ?", (study_key,))
        return [row["sop_key"] for row in rows]

    def watched_stamp(self, item_key: str) -> str:
        """Return the stamp under which an item of the watched folder was read, empty where it was not."""
        rows = self._rows("SELECT stamp FROM watched WHERE item_key = ?", (item_key,))
        return str(rows[0]["stamp"]) if rows else ""

    def watched(self, item_key: str, stamp: str, reason: str = "") -> None:
        """Record that an item was read, or why it could not be."""
        with self._change() as db:
            db.execute("INSERT OR REPLACE INTO watched VALUES (?, ?, ?)", (item_key, stamp, reason))
            add_to_counter(db, "watched_unreadable" if reason else "watched_read", 1)

    def add_commitment(self, transaction_uid: str, calling_ae: str, items: Sequence[tuple[str, str]]) -> None:
        """Record a request for storage commitment: (SOP class, SOP instance) of each item, to be answered."""
        with self._change() as db:
            db.execute(
                "INSERT OR IGNORE INTO commitments (transaction_uid, calling_ae, items) VALUES (?, ?, ?)",
                (transaction_uid, calling_ae, json.dumps(list(items))),
            )

    def due_commitments(self) -> list[sqlite3.Row]:
        """Return the requests that are to be answered now."""
        return self._rows("SELECT * FROM commitments WHERE next_at <= ? ORDER BY id LIMIT 20", (self.clock(),))

    def promise(self, sop_keys: Sequence[str]) -> set[str]:
        """Mark instances as kept for good and return those that are there."""
        found: set[str] = set()
        with self._change() as db:
            for key in sop_keys:
                done = db.execute("UPDATE instances SET committed = 1 WHERE sop_key = ? AND kept = 1", (key,))
                if done.rowcount:
                    found.add(key)
        return found

    def commitment_answered(self, number: int, after_s: float | None) -> None:
        """Record that a report was taken, or with ``after_s`` that it is to be tried again."""
        with self._change() as db:
            if after_s is None:
                db.execute("DELETE FROM commitments WHERE id = ?", (number,))
            else:
                db.execute(
                    "UPDATE commitments SET attempts = attempts + 1, next_at = ? WHERE id = ?",
                    (self.clock() + after_s, number),
                )

    # -- what is known ------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Return counts, figures and reasons for status, health and metrics; keys only."""
        self.flush_counters()
        now = self.clock()
        states = dict.fromkeys(STATES, 0)
        states |= {r["state"]: r["n"] for r in self._rows("SELECT state, COUNT(*) AS n FROM studies GROUP BY state")}
        deliveries: dict[str, dict[str, int]] = {}
        for row in self._rows("SELECT destination, state, COUNT(*) AS n FROM deliveries GROUP BY destination, state"):
            deliveries.setdefault(row["destination"], {})[row["state"]] = row["n"]
        (oldest,) = self._rows(
            "SELECT MIN(first_at) AS at FROM studies WHERE state IN ('receiving', 'retry', 'working', 'sending')"
        )
        bad = self._rows(
            "SELECT study_key, state, reason FROM studies WHERE state IN ('quarantined', 'held')"
            " ORDER BY done_at DESC LIMIT 20"
        )
        stuck = self._rows(
            "SELECT study_key, destination, state, attempts, reason FROM deliveries"
            " WHERE state IN ('waiting', 'refused') AND reason <> '' ORDER BY attempts DESC LIMIT 20"
        )
        return {
            "studies": states,
            "deliveries": deliveries,
            "counters": {row["name"]: row["value"] for row in self._rows("SELECT name, value FROM counters")},
            "spool_bytes": self.spool_bytes(),
            "oldest_waiting_s": round(now - oldest["at"], 1) if oldest["at"] is not None else 0.0,
            "quarantined": [dict(row) for row in bad],
            "undelivered": [dict(row) for row in stuck],
        }

    def results(self) -> list[dict[str, Any]]:
        """Return every result with the times of its delivery, for tests and benchmarks."""
        return [
            dict(row)
            for row in self._rows(
                "SELECT r.study_key, r.revision, r.series_uid, r.n_slices, r.received_at, r.made_at, r.seconds,"
                " d.destination, d.state, d.attempts, d.delivered_at FROM results r"
                " LEFT JOIN deliveries d USING (study_key, revision) ORDER BY r.made_at"
            )
        ]

    def states(self) -> Mapping[str, str]:
        """Return the state of every study."""
        return {row["study_key"]: row["state"] for row in self._rows("SELECT study_key, state FROM studies")}
