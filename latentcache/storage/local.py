"""Locations of a store's bytes: a directory or an object store behind one small interface.

Every object is immutable and appears whole or not at all. Locally that takes four steps: write aside, fsync the file,
link it under its name (which fails if the name is taken), fsync the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from numpy.typing import NDArray

from latentcache import StoreError
from latentcache.storage.base import TEMPORARY, Buffer, Entry
from latentcache.storage.planted_links import refuse_planted
from latentcache.storage.system_calls import READ_FLAGS, read_at, sync_folder

FILE_SCHEME = "file://"
IOV_MAX = 1024
"""Linux's limit on the buffers of one preadv."""


def local_path(url: str) -> Path:
    """Return the path that a file:// URL names (percent-encoded, RFC 8089), or a plain path as it is."""
    if not url.startswith(FILE_SCHEME):
        return Path(url)
    return Path(os.fsdecode(unquote_to_bytes(os.fsencode(url.removeprefix(FILE_SCHEME)))))


class FileSystem:
    """The system calls that change a local store, one method each, so that a test can crash between any two."""

    def write(self, path: Path, buffers: Sequence[Buffer]) -> None:
        """Write a new file and fsync its bytes (not its name)."""
        with open(path, "xb", buffering=0) as file:
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def replace(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        path.unlink(missing_ok=True)

    def mkdir(self, path: Path) -> None:
        path.mkdir(exist_ok=True)

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def fsync_folder(self, path: Path) -> None:
        sync_folder(path)


class LocalLocation:
    """A directory on a file system that has hard links and honours fsync."""

    def __init__(self, root: Path, files: FileSystem | None = None) -> None:
        self.root = root
        self.files = files or FileSystem()

    @property
    def url(self) -> str:
        return str(self.root)

    def _at(self, path: str) -> Path:
        """Return a path in the file system; never outside of the location, whatever a file of the store may name.

        Raises:
            StoreError: It climbs out.
        """
        if path.startswith("/") or ".." in path.split("/"):
            raise StoreError(
                "a path that leads out of the store",
                expected="paths below the store's own folder",
                remedy="A file of the store was tampered with: run `ctpipe verify STORE`, restore it from a copy.",
            )
        return self.root / path

    def _make_folder(self, folder: Path) -> None:
        """Create missing folders, each made durable in its parent, so that a name below survives a power cut."""
        refuse_planted(folder, self.root)
        missing = []
        while not folder.is_dir():
            missing.append(folder)
            folder = folder.parent
        for made in reversed(missing):
            self.files.mkdir(made)
            self.files.fsync_folder(made.parent)

    @contextlib.contextmanager
    def _aside(self, target: Path, buffers: Sequence[Buffer]) -> Iterator[Path]:
        self._make_folder(target.parent)
        aside = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            self.files.write(aside, buffers)
            yield aside
        finally:
            self.files.unlink(aside)

    def put_once(self, path: str, buffers: Sequence[Buffer]) -> None:
        target = self._at(path)
        if target.exists():
            raise FileExistsError(path)
        with _room_for(buffers), self._aside(target, buffers) as aside:
            self.files.link(aside, target)
        self.files.fsync_folder(target.parent)

    def put(self, path: str, data: bytes) -> None:
        target = self._at(path)
        with _room_for([data]), self._aside(target, [data]) as aside:
            self.files.replace(aside, target)
        self.files.fsync_folder(target.parent)

    def read(self, path: str) -> bytes:
        return self._at(path).read_bytes()

    def read_into(self, path: str, offset: int, groups: Sequence[Sequence[NDArray[Any]]]) -> Iterator[None]:
        descriptor = os.open(self._at(path), READ_FLAGS)
        try:
            for group in groups:
                for first in range(0, len(group), IOV_MAX):
                    batch: Sequence[Any] = group[first : first + IOV_MAX]
                    wanted = sum(b.nbytes for b in batch)
                    if read_at(descriptor, batch, offset) != wanted:
                        _read_slowly(descriptor, offset, batch)
                    offset += wanted
                yield
        finally:
            os.close(descriptor)

    def size(self, path: str) -> int:
        return self._at(path).stat().st_size

    def list(self, prefix: str) -> Iterator[Entry]:
        yield from self._walk(str(self._at(prefix)))

    def _walk(self, folder: str) -> Iterator[Entry]:
        for entry in self._scan(folder):
            if isinstance(entry, Entry):
                yield entry
            else:
                yield from self._walk(entry)

    def _scan(self, folder: str) -> Iterator[Entry | str]:
        """A folder's files as entries and its folders as paths, in order of name."""
        try:
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except FileNotFoundError:
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.path
                continue
            try:
                stat = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # an aside file, linked and gone since the folder was read
            yield Entry(os.path.relpath(entry.path, self.root).replace(os.sep, "/"), stat.st_size, stat.st_mtime)

    def objects(self, prefix: str) -> Sequence[Entry]:
        return [entry for entry in self._scan(str(self._at(prefix))) if isinstance(entry, Entry)]

    def folders(self, prefix: str) -> Sequence[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._at(prefix)) if entry.is_dir())
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        target = self._at(path)
        self.files.unlink(target)
        # An emptied folder is litter too; one that a writer has just filled refuses, and stays.
        for folder in target.parents:
            if folder == self.root:
                break
            try:
                self.files.rmdir(folder)
            except OSError:
                break

    def child(self, path: str) -> LocalLocation:
        return LocalLocation(self._at(path), self.files)


@contextlib.contextmanager
def _room_for(buffers: Sequence[Buffer]) -> Iterator[None]:
    """A full disk or quota, or a place that is read-only, as an error that says what to do; nothing is left aside."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreError(
                f"this place cannot be written to ({os.strerror(error.errno)})",
                expected="a folder in which this user may make files",
                remedy="Mount it for writing or change its permissions; commands that only read need neither.",
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        size = sum(memoryview(b).nbytes for b in buffers)
        raise StoreError(
            f"no space left for {size:,} bytes where the store lies ({os.strerror(error.errno)})",
            expected="room for every latent; nothing of this one is kept, and what is committed stays whole",
            remedy="Free some space (`ctpipe gc STORE` may help), then run the same command again: it resumes.",
        ) from error


def _read_slowly(descriptor: int, offset: int, buffers: Sequence[Any]) -> None:
    """The rare short read (signals, network mounts): buffer by buffer until full or the file ends."""
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while view:
            count = read_at(descriptor, [view], offset)
            if count == 0:
                raise EOFError("the file is shorter than its index says")
            view, offset = view[count:], offset + count
