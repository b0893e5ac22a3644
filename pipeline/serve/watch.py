"""The watched folder: zips and sub-folders of DICOM files, read as if they had been sent; its files are not changed."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from latentcache import InputError
from pipeline.archive import Limits, open_archive
from pipeline.engines import note
from pipeline.identity import Keys
from pipeline.serve.config import WatchConfig
from pipeline.serve.node import Intake, Taken, Verdict
from pipeline.serve.state import Queue

log = logging.getLogger("ctpipe.serve")


SENDER = "FOLDER"
"""Calling AE by which rules name the watched folder."""


class Watch:
    """Looks through one folder, item by item; an item is read once for every state that it settles in."""

    def __init__(self, config: WatchConfig, intake: Intake, queue: Queue, keys: Keys, *, object_bytes: int) -> None:
        if not config.folder.is_dir():
            raise InputError(
                "the watched folder does not exist", expected="a folder", remedy="Make it, or correct watch.folder."
            )
        self._config, self._intake, self._queue, self._keys = config, intake, queue, keys
        self._object_bytes = object_bytes

    def step(self, stopping: Callable[[], bool] = lambda: False) -> int:
        """Read what is new and has not changed for a while; return how many items were read."""
        done = 0
        for path in sorted(self._config.folder.iterdir()):
            if stopping():
                break
            if path.name.startswith("."):
                continue
            key = self._keys.archive(str(path))
            try:
                stamp, changed = _state(path)
            except OSError:
                continue  # it went away while we looked
            settled = time.time() - changed >= self._config.settled_s
            if settled and stamp != self._queue.watched_stamp(key) and self._intake.has_room():
                done += self._read(path, key, stamp, stopping)
        return done

    def _read(self, path: Path, key: str, stamp: str, stopping: Callable[[], bool]) -> int:
        """Take in every member of an item. It counts as read only when nothing of it was refused for want of room."""
        refused, studies = 0, set()
        try:
            source = open_archive(path, Limits(member_bytes=self._object_bytes))
            try:
                for member in source.members():
                    if stopping():
                        return 0
                    taken = self._member(source.read, member.index)
                    if taken.verdict is Verdict.FULL:
                        return 0
                    refused += taken.verdict.status != 0
                    studies.add(taken.study_key)
            finally:
                source.close()
        except InputError as error:
            note(log, "watched_unreadable", logging.WARNING, item_key=key)
            self._queue.watched(key, stamp, error.found)
            return 0
        self._queue.sender_finished(sorted(studies))
        self._queue.watched(key, stamp)
        note(log, "watched_read", item_key=key, refused=refused)
        return 1

    def _member(self, read: Callable[[int], bytes], index: int) -> Taken:
        try:
            data = read(index)
        except InputError:
            return Taken(Verdict.UNREADABLE)
        return self._intake.take(data, SENDER) if data[128:132] == b"DICM" else Taken(Verdict.NO_DICOM)


def _state(path: Path) -> tuple[str, float]:
    """Return a text that changes when an item does, and when it last changed."""
    newest, size, count = 0.0, 0, 0
    for file in _files(path):
        info = file.stat()
        newest, size, count = max(newest, info.st_mtime, info.st_ctime), size + info.st_size, count + 1
    return f"{count}:{size}:{newest!r}", newest


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for folder, _, names in os.walk(path):
        for name in names:
            yield Path(folder, name)
