"""Archives and folders as numbered members, read in place: nothing is ever extracted to disk.

A member is inflated only as far as is asked for, so listing the headers of a series touches a few kilobytes each. Whole
members are checked against the CRC-32 of the directory.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from latentcache.storage import bytes_at, local_path
from pipeline.archive.directory_entries import is_nifti, list_folder, open_regular, unlisted_folder, url_of
from pipeline.archive.zip_directory import (
    LOCAL_HEADER,
    LOCAL_NAME_SPARE,
    STORED,
    ArchiveError,
    Limits,
    Member,
    StorageError,
    body_start,
    check_sum,
    head_of,
    head_range,
    inflated,
    read_directory,
)

UNREADABLE_FILE = "a file of the folder that cannot be opened or read"


class Scratch:
    """Memory that one thread reads member after member into.

    Fresh memory for every slice comes from the kernel page by page: that cost a third of the time of reading a series.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._cells = np.empty((0, 0), np.uint16)

    def view(self, size: int) -> memoryview:
        """``size`` bytes to write to; whatever was read before is overwritten."""
        if len(self._held) < size:
            self._held = bytearray(size)
        return memoryview(self._held)[:size]

    def cells(self, rows: int, columns: int) -> NDArray[np.uint16]:
        """An image to decode into, likewise."""
        if self._cells.shape != (rows, columns):
            self._cells = np.empty((rows, columns), np.uint16)
        return self._cells


class RangeReader(Protocol):
    """Random access to the bytes of one file, local or in an object store."""

    size: int
    stamp: str
    """Changes when the file does: size with modification time, or the ETag."""

    def read(self, offset: int, length: int) -> bytes: ...

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several (offset, length) at once; one request where the store can join them."""
        ...

    def close(self) -> None: ...


class Source(Protocol):
    """Source of DICOM files. Thread-safe for reading."""

    url: str

    @property
    def digest(self) -> str:
        """Hash over size and CRC-32 (or modification time) of every member."""
        ...

    @property
    def stamp(self) -> str:
        """Changes when the source does, known without opening any member."""
        ...

    def members(self) -> Sequence[Member]: ...

    def read(self, index: int, limit: int | None = None) -> bytes:
        """The first ``limit`` bytes of a member, or all of it (then checked against its CRC-32)."""
        ...

    def read_into(self, index: int, scratch: Scratch) -> memoryview:
        """A whole member as of `read`, read-only, good until ``scratch`` is used again."""
        ...

    def heads(self, indices: Sequence[int], limit: int) -> Iterator[tuple[int, bytes | InputError]]:
        """The first ``limit`` bytes of many members; a member that cannot be read yields its error."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ClosedAfterUse(ABC):
    """``with open_archive(...) as source``: the source is closed at the end of the block."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalFile:
    """A file read by position (pread): safe for threads, and for network shares whose files vanish."""

    def __init__(self, path: Path) -> None:
        self._descriptor = open_regular(path)
        info = os.fstat(self._descriptor)
        self.size = info.st_size
        self.stamp = f"{info.st_size}:{info.st_mtime_ns}"

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0:
            try:
                part = bytes_at(self._descriptor, length, offset)
            except OSError as error:
                raise StorageError(f"an archive that can no longer be read ({error.strerror})") from None
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(offset, length) for offset, length in ranges]

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class _MemberTable(ClosedAfterUse):
    """Members by index, and the digest over all of them."""

    def __init__(self, members: list[Member]) -> None:
        self._members = members
        self._by_index = {member.index: member for member in members}

    def members(self) -> Sequence[Member]:
        return self._members

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for member in self._members:
            digest.update(f"{member.crc32 if member.crc32 is not None else -member.stamp}:{member.size}\n".encode())
        return digest.hexdigest()[:32]

    def _readable(self, index: int) -> Member:
        member = self._by_index.get(index)
        if member is None:
            raise ArchiveError(
                f"no member {index} in this archive", "It changed since it was ingested: run `ctpipe ingest` again."
            )
        if member.refusal:
            raise ArchiveError(f"a member cannot be read: {member.refusal}")
        return member


class ZipSource(_MemberTable):
    """A zip behind any range reader."""

    def __init__(self, url: str, reader: RangeReader, limits: Limits | None = None) -> None:
        self.url = url
        self._reader = reader
        super().__init__(read_directory(reader.size, reader.read, limits or Limits()))

    @property
    def stamp(self) -> str:
        return self._reader.stamp

    def read(self, index: int, limit: int | None = None) -> bytes:
        member = self._readable(index)
        if limit is not None and limit < member.size:
            return head_of(member, self._reader.read(*head_range(member, limit)), limit, self._reader.read)
        packed = self._packed(member)
        data = bytes(packed) if member.method == STORED else b"".join(inflated(member, packed))
        check_sum(member, data)
        return data

    def read_into(self, index: int, scratch: Scratch) -> memoryview:
        member = self._readable(index)
        packed = self._packed(member)
        if member.method == STORED:
            check_sum(member, packed)
            return packed
        view, at = scratch.view(member.size), 0
        for piece in inflated(member, packed):
            view[at : at + len(piece)] = piece
            at += len(piece)
        check_sum(member, view)
        return view.toreadonly()

    def _packed(self, member: Member) -> memoryview:
        """A member's bytes as they lie in the archive."""
        raw = self._reader.read(member.offset, LOCAL_HEADER.size + LOCAL_NAME_SPARE + member.compressed_size)
        start = body_start(member, raw)
        packed = memoryview(raw)[start : start + member.compressed_size]
        if len(packed) < member.compressed_size:
            # A name or extra field of more than a kilobyte, or the archive's end: ask once more, exactly.
            packed = memoryview(self._reader.read(member.offset + start, member.compressed_size))
        if len(packed) < member.compressed_size:
            raise ArchiveError("a member that is cut short, so the archive is truncated")
        return packed

    def heads(self, indices: Sequence[int], limit: int) -> Iterator[tuple[int, bytes | InputError]]:
        """See `Source.heads`; ranges go out 64 at a time, so that a remote store can join them."""
        for first in range(0, len(indices), 64):
            batch: list[Member] = []
            for index in indices[first : first + 64]:
                try:
                    batch.append(self._readable(index))
                except ArchiveError as error:
                    yield index, error
            for member, raw in zip(batch, self._reader.read_many([head_range(m, limit) for m in batch]), strict=True):
                try:
                    yield member.index, head_of(member, raw, limit, self._reader.read)
                except ArchiveError as error:
                    yield member.index, error

    def close(self) -> None:
        self._reader.close()


class FolderSource(_MemberTable):
    """Every file below a folder, in a stable order. Links that leave the folder are not followed.

    What is no file (a link to nothing, a named pipe, a folder that may not be listed) is a member with a refusal,
    behind all others, so that it is reported and moves no number.
    """

    def __init__(self, path: Path, limits: Limits | None = None) -> None:
        self.url = url_of(str(path))
        self._root = path
        members, self._odd_names = _files_below(path, limits or Limits())
        super().__init__(members)

    @property
    def stamp(self) -> str:
        return self.digest

    def read(self, index: int, limit: int | None = None) -> bytes:
        member = self._readable(index)
        try:
            name = self._odd_names.get(index, member.name)
            with os.fdopen(open_regular(self._root / name), "rb") as file:
                data = file.read(member.size if limit is None else limit)
                after = os.fstat(file.fileno())
        except OSError:
            raise ArchiveError(UNREADABLE_FILE) from None
        short = limit is None and len(data) != member.size
        if short or (after.st_size, after.st_mtime_ns) != (member.size, member.stamp):
            raise ArchiveError("a file of the folder changed while it was read", "Run the command again.")
        return data

    def read_into(self, index: int, scratch: Scratch) -> memoryview:
        return memoryview(self.read(index))

    def heads(self, indices: Sequence[int], limit: int) -> Iterator[tuple[int, bytes | InputError]]:
        for index in indices:
            try:
                yield index, self.read(index, limit)
            except ArchiveError as error:
                yield index, error

    def close(self) -> None:
        """Nothing is held open."""


class FileSource(FolderSource):
    """One file that is no archive, a NIfTI volume, as the only member of a source."""

    def __init__(self, path: Path) -> None:
        self.url = url_of(str(path))
        self._root = path.parent
        info = path.stat()
        shown = os.fsencode(path.name).decode(errors="backslashreplace")
        self._odd_names = {0: path.name}
        _MemberTable.__init__(self, [Member(0, shown, info.st_size, info.st_size, None, stamp=info.st_mtime_ns)])


def _files_below(path: Path, limits: Limits) -> tuple[list[Member], dict[int, str]]:
    """Members of a folder, and by number the true names of those whose name is not valid UTF-8."""
    root = path.resolve()
    members: list[Member] = []
    refused: list[tuple[str, str]] = []
    odd_names: dict[int, str] = {}
    pending = [str(path)]
    while pending:
        folder = pending.pop()
        try:
            entries = list_folder(folder)
        except OSError as error:
            entries = [unlisted_folder(folder, error)]
        pending.extend(entry.path for entry in reversed(entries) if entry.kind == "folder")
        for entry in entries:
            relative = os.path.relpath(entry.path, path).replace(os.sep, "/")
            shown = os.fsencode(relative).decode(errors="backslashreplace")
            if entry.kind == "unusable" and not entry.name.startswith("."):
                refused.append((shown, entry.refusal))
            if entry.kind in ("folder", "unusable"):
                continue
            refusal = ""
            if entry.link and not Path(entry.path).resolve().is_relative_to(root):
                refusal = "a link that leaves the folder"
            elif entry.size > limits.member_bytes:
                refusal = f"it has {entry.size >> 20} MiB, more than any image"
            if shown != relative:
                odd_names[len(members)] = relative
            members.append(
                Member(len(members), shown, entry.size, entry.size, None, stamp=entry.mtime_ns, refusal=refusal)
            )
    members += [Member(len(members) + i, name, 0, 0, None, refusal=why) for i, (name, why) in enumerate(refused)]
    return members, odd_names


def open_archive(url: str | Path, limits: Limits | None = None) -> Source:
    """Open a zip, a folder of DICOM files or a NIfTI file.

    A zip may be a path, file:// or an object store's URL such as s3://bucket/key.zip.

    Raises:
        InputError: No zip.
        StorageError: Nothing there, or the place does not answer.
    """
    text = str(url)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme and scheme != "file":
        from pipeline.archive.object_store import ObjectFile

        return ZipSource(text, ObjectFile(text), limits)
    path = local_path(text)
    if path.is_dir():
        return FolderSource(path, limits)
    try:
        if is_nifti(path):
            return FileSource(path)
        reader = LocalFile(path)
    except OSError as error:
        raise StorageError(
            f"an archive that cannot be opened ({error.strerror})", "Check the path and its permissions."
        ) from None
    try:
        return ZipSource(text, reader, limits)
    except BaseException:
        reader.close()
        raise
