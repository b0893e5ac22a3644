"""Take in one DICOM instance: check it, make it durable, record it; only then is it acknowledged to the sender."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
import time
from dataclasses import dataclass
from enum import Enum

from latentcache import InputError
from pipeline.engines import note
from pipeline.identity import Keys
from pipeline.reading import Header, parse_header
from pipeline.serve.config import LimitsConfig
from pipeline.serve.state import GIB, Folders, Queue, write_durably
from pipeline.writing import ALGORITHM, PRIVATE_CREATOR

log = logging.getLogger("ctpipe.serve")


_SOP_INSTANCE, _STUDY, _DESCRIPTION = 0x00080018, 0x0020000D, 0x0008103E
DISK_LOOK_S = 2.0


class Verdict(Enum):
    """Verdict on an instance, with its C-STORE status (DICOM PS3.4 B.2.3, PS3.7 C)."""

    STORED = 0x0000
    REPEATED = 0x0001  # reported as success: it is here already, byte for byte
    OURS = 0x0002  # reported as success: our own result, sent back by a router
    NO_DICOM = 0x0003  # of the watched folder alone: a viewer, a picture
    FULL = 0xA700
    UNREADABLE = 0xC000
    MISMATCH = 0xA900
    DIFFERENT = 0x0111
    TOO_MANY = 0xA701

    @property
    def status(self) -> int:
        return 0 if self.value < 0x10 else 0xA700 if self is Verdict.TOO_MANY else self.value


@dataclass(frozen=True)
class Taken:
    """A verdict and the key of the study concerned, empty where the instance does not name one."""

    verdict: Verdict
    study_key: str = ""


class Intake:
    """Intake of instances, from associations and from the watched folder alike. Safe for threads."""

    def __init__(self, folders: Folders, queue: Queue, keys: Keys, limits: LimitsConfig) -> None:
        self._folders, self._queue, self._keys, self._limits = folders, queue, keys, limits
        self._disk_lock, self._disk_at, self._disk_ok = threading.Lock(), -DISK_LOOK_S, True
        self._stripes = [threading.Lock() for _ in range(64)]
        self._spool_bytes = queue.spool_bytes()

    def has_room(self) -> bool:
        """Return whether there is room on the disk and in the spool; looked up every two seconds."""
        with self._disk_lock:
            now = time.monotonic()
            if now - self._disk_at >= DISK_LOOK_S:
                self._disk_at = now
                self._spool_bytes = self._queue.spool_bytes()
                was, self._disk_ok = self._disk_ok, self._room_now()
                if was != self._disk_ok:
                    event = "disk_has_room" if self._disk_ok else "disk_is_full"
                    note(log, event, logging.WARNING, free_bytes=self._folders.free_bytes())
            return self._disk_ok

    def _room_now(self) -> bool:
        limits = self._limits
        enough = self._folders.free_bytes() >= limits.min_free_gib * GIB
        return enough and self._spool_bytes < limits.spool_gib * GIB

    def take(self, data: bytes, calling_ae: str, sop_uid: str | None = None) -> Taken:
        """Take in one DICOM file.

        Args:
            data: The whole file, with its meta information.
            calling_ae: Who sent it.
            sop_uid: The instance that the sender announced, where it did.

        Never raises for what a sender or a disk can do wrong: that is a verdict, counted and logged by key.
        """
        taken = self._take(data, calling_ae, sop_uid)
        if taken.verdict is not Verdict.STORED:
            self._note(taken)
        return taken

    def _take(self, data: bytes, calling_ae: str, sop_uid: str | None) -> Taken:
        if not self.has_room():
            return Taken(Verdict.FULL)
        try:
            header = parse_header(data, whole=True)
        except InputError:
            return Taken(Verdict.UNREADABLE)
        uid, study_uid = header.text(_SOP_INSTANCE), header.text(_STUDY)
        if not uid or not study_uid:
            return Taken(Verdict.UNREADABLE)
        study_key = self._keys.study(study_uid)
        if sop_uid is not None and uid != sop_uid.strip():
            return Taken(Verdict.MISMATCH, study_key)
        if _is_ours(header, data):
            return Taken(Verdict.OURS, study_key)
        sop_key = self._keys.text(uid)
        with self._stripes[int(sop_key[:2], 16) % len(self._stripes)]:
            try:
                return self._store(data, study_key, sop_key, calling_ae)
            except (OSError, sqlite3.Error) as error:
                with self._disk_lock:
                    self._disk_at = -DISK_LOOK_S  # look again at once
                note(log, "store_failed", logging.ERROR, study_key=study_key, error=type(error).__name__)
                return Taken(Verdict.FULL, study_key)

    def _store(self, data: bytes, study_key: str, sop_key: str, calling_ae: str) -> Taken:
        # Of the data set alone: another sender writes another preamble and meta information.
        digest = hashlib.sha256(data[_data_set_at(data) :]).hexdigest()
        path = self._folders.image(study_key, sop_key)
        known = self._queue.stored(sop_key)
        if known is not None:
            if (known.study_key, known.digest) != (study_key, digest):
                return Taken(Verdict.DIFFERENT, study_key)
            if not known.kept:
                write_durably(path, data)
                self._queue.restore_instance(sop_key, study_key)
            return Taken(Verdict.REPEATED, study_key)
        count, size = self._queue.study_size(study_key)
        if count >= self._limits.instances_per_study or size + len(data) > self._limits.study_gib * GIB:
            return Taken(Verdict.TOO_MANY, study_key)
        write_durably(path, data)
        try:
            self._queue.add_instance(sop_key, study_key, digest, len(data), calling_ae)
        except sqlite3.Error:
            path.unlink(missing_ok=True)
            raise
        return Taken(Verdict.STORED, study_key)

    def delete(self, study_key: str, sop_key: str) -> None:
        """Delete the file of an instance that need not be kept, unless it has come again in the meantime."""
        with self._stripes[int(sop_key[:2], 16) % len(self._stripes)]:
            known = self._queue.stored(sop_key)
            if known is not None and not known.kept:
                self._folders.image(study_key, sop_key).unlink(missing_ok=True)

    def _note(self, taken: Taken) -> None:
        name = taken.verdict.name.lower()
        level = logging.INFO if taken.verdict.status == 0 else logging.WARNING
        note(log, f"instance_{name}", level, study_key=taken.study_key)
        self._queue.count(f"instances_{name}")


def _is_ours(header: Header, data: bytes) -> bool:
    """Return whether this is a series that ctpipe made: a router sends it back, and it must not come round again."""
    return header.text(_DESCRIPTION).startswith(f"{ALGORITHM} ") or PRIVATE_CREATOR.encode() in data


def _data_set_at(data: bytes) -> int:
    """Return the offset of the data set behind the file meta information (DICOM PS3.10 7.1), 0 where there is none."""
    if data[128:132] != b"DICM" or data[132:138] != b"\x02\x00\x00\x00UL":
        return 0
    return 144 + int.from_bytes(data[140:144], "little")
