"""The central directory of a zip, read through ranges and checked before anything is inflated (APPNOTE.TXT 4.3, 4.4).

Members are known by their index, never by name: names may be duplicated, and no name is ever used as a path.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from isal import isal_zlib

from latentcache import InputError

_PIECE = 1 << 15
LOCAL_NAME_SPARE = 1024
"""Bytes read beyond a member's local header for its name and extra field, so that one range usually suffices."""


def head_range(member: Member, limit: int) -> tuple[int, int]:
    """Bytes of the archive that hold the first ``limit`` bytes of a member as a rule (deflate expands by 5 in 16 K)."""
    packed = min(member.compressed_size, limit + limit // 1024 + 64)
    return member.offset, LOCAL_HEADER.size + LOCAL_NAME_SPARE + packed


def body_start(member: Member, raw: bytes) -> int:
    """Length of a member's local header, whose name and extra field may differ from the directory's."""
    if len(raw) < LOCAL_HEADER.size or raw[:4] != b"PK\x03\x04":
        raise ArchiveError("a member whose local header is missing, so the archive is truncated or damaged")
    fields = LOCAL_HEADER.unpack_from(raw)
    if fields[2] & 0x2041:
        raise ArchiveError("an encrypted member", "Decrypt the archive first.")
    return LOCAL_HEADER.size + int(fields[9]) + int(fields[10])


def head_of(member: Member, raw: bytes, limit: int, read: ReadRange) -> bytes:
    """Return the first ``limit`` bytes of a member, fewer only where it ends before.

    Args:
        member: As of the directory.
        raw: The bytes of the archive that `head_range` names.
        limit: Bytes wanted.
        read: Asked for more where the name and extra field are long, or the data expand as they are packed.

    Raises:
        ArchiveError: Truncated or damaged.
    """
    start = body_start(member, raw)
    wanted, size = min(limit, member.size), head_range(member, limit)[1] - LOCAL_HEADER.size - LOCAL_NAME_SPARE
    while True:
        size = min(size, member.compressed_size)
        packed = memoryview(raw)[start : start + size]
        if len(packed) < size:
            packed = memoryview(read(member.offset + start, size))
        if len(packed) < size:
            raise ArchiveError("a member that is cut short, so the archive is truncated")
        head = bytes(packed[:wanted]) if member.method == STORED else _inflate_some(packed, wanted)
        if len(head) >= wanted or size == member.compressed_size:
            return head
        size *= 4


def _inflate_some(packed: memoryview, wanted: int) -> bytes:
    if not wanted:
        return b""
    try:
        head: bytes = isal_zlib.decompressobj(-15).decompress(packed, wanted)
    except isal_zlib.error:
        raise ArchiveError("a member whose compressed data are damaged") from None
    return head


def inflated(member: Member, packed: memoryview) -> Iterator[bytes]:
    """The content piece by piece, never more than the declared size: a bomb that misstates it fails."""
    stream, size = isal_zlib.decompressobj(-15), 0
    for start in range(0, len(packed), _PIECE):
        try:
            piece: bytes = stream.decompress(packed[start : start + _PIECE])
        except isal_zlib.error:
            raise ArchiveError("a member whose compressed data are damaged") from None
        size += len(piece)
        if size > member.size:
            break
        yield piece
        if stream.eof:
            break
    if size != member.size or not stream.eof:
        raise ArchiveError("a member whose compressed data are cut short or larger than declared")


def check_sum(member: Member, data: bytes | memoryview) -> None:
    """Raises ArchiveError where content is not what the directory says."""
    if len(data) != member.size or isal_zlib.crc32(data) != member.crc32:
        raise ArchiveError("a member whose content does not match its checksum, so damaged in storage or transfer")


STORED, DEFLATED = 0, 8
_METHODS = {1: "Shrink", 6: "Implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd"}
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_MAX_COMMENT = 65_535
_MAX_DIRECTORY = 1 << 29


ReadRange = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Member:
    """One file of an archive or folder.

    ``crc32`` is None where the container keeps none (a folder); ``stamp`` is then the modification time in ns.
    ``refusal`` says why the member cannot be read, where that is known from the directory alone.
    """

    index: int
    name: str
    compressed_size: int
    size: int
    crc32: int | None
    method: int = STORED
    offset: int = 0
    stamp: int = 0
    refusal: str = ""


class ArchiveError(InputError):
    """An archive, or a member of one, that cannot be read. ``found`` names no file."""

    def __init__(self, found: str, remedy: str = "Export the archive again; the rest of it is not affected.") -> None:
        super().__init__(found, expected="a whole, unencrypted zip with stored or deflated members", remedy=remedy)

    def __reduce__(self) -> tuple[object, ...]:
        return (ArchiveError, (self.found, self.remedy))


class StorageError(InputError):
    """The place of an archive fails to answer: nothing is known against the archive, and the next run asks again."""

    def __init__(self, found: str, remedy: str = "Run the command again.") -> None:
        super().__init__(found, expected="the archive at its place, on storage that answers", remedy=remedy)

    def __reduce__(self) -> tuple[object, ...]:
        return (StorageError, (self.found, self.remedy))


@dataclass(frozen=True)
class Limits:
    """Limits on what one archive may ask for before it is called a bomb.

    A lone air slice compresses 1000:1, so a ratio alone says nothing: it counts only above ``ratio_from`` bytes.
    """

    member_bytes: int = 4 << 30
    ratio: int = 200
    ratio_from: int = 64 << 20
    total_bytes: int = 1 << 40
    members: int = 2_000_000


def read_directory(size: int, read: ReadRange, limits: Limits) -> list[Member]:
    """Members in the order of the central directory.

    Args:
        size: Bytes of the archive.
        read: Returns ``length`` bytes at ``offset``; called three times at most.

    Raises:
        ArchiveError: No zip, a damaged or split one, or one that claims more than ``limits``.
    """
    tail_length = min(size, _MAX_COMMENT + _END.size + _LOCATOR64.size)
    tail_start = size - tail_length
    tail = read(tail_start, tail_length)
    at = _find_end(tail)
    if at < 0:
        raise ArchiveError("a zip without its directory, so truncated or no zip at all")
    _, disk, first_disk, _, count, length, offset, _ = _END.unpack_from(tail, at)
    directory_end = tail_start + at
    if at >= _LOCATOR64.size and tail[at - _LOCATOR64.size : at - _LOCATOR64.size + 4] == b"PK\x06\x07":
        _, _, end64_at, _ = _LOCATOR64.unpack_from(tail, at - _LOCATOR64.size)
        directory_end, disk, first_disk, count, length, offset = _read_end64(size, read, end64_at, tail_start + at)
    if disk or first_disk:
        raise ArchiveError("a zip split over several files", "Join the parts into one zip first.")
    if length > _MAX_DIRECTORY or count > limits.members or count * _ENTRY.size > length:
        raise ArchiveError(f"a zip that claims {count} members, more than its directory holds or than is sane")
    # Bytes before the zip (a self-extracting stub) shift every offset by the same amount.
    shift = directory_end - length - offset
    if shift < 0:
        raise ArchiveError("a zip whose directory lies outside of the file, so truncated")
    directory = read(directory_end - length, length)
    if len(directory) != length:
        raise ArchiveError("a zip whose directory is cut short")
    return _parse_entries(directory, count, shift, directory_end - length, limits)


def _find_end(tail: bytes) -> int:
    """Return where the end of central directory record begins (APPNOTE 4.3.16), or -1.

    A comment may hold the record's signature: the record is the last one whose comment reaches to the end of the file,
    and which a directory or a ZIP64 locator can precede. Behind bytes that were appended, it is the last one.
    """
    signature, last = b"PK\x05\x06", -1
    at = tail.rfind(signature)
    while at >= 0:
        if at + _END.size <= len(tail):
            last = max(last, at)
            record = _END.unpack_from(tail, at)
            if at + _END.size + record[-1] == len(tail) and _may_end_zip(tail, at, record):
                return at
        at = tail.rfind(signature, 0, at)
    return last


def _may_end_zip(tail: bytes, at: int, record: tuple[int, ...]) -> bool:
    """Whether a directory is right before a record, as far as the end of the file shows."""
    count, length = record[4], record[5]
    if tail[max(at - _LOCATOR64.size, 0) : at][:4] == b"PK\x06\x07":
        return True
    # Of an empty zip nothing lies there; it is found as the last record of all.
    return (
        bool(count) and length >= _ENTRY.size and (length > at or tail[at - length : at - length + 4] == b"PK\x01\x02")
    )


def _read_end64(size: int, read: ReadRange, offset: int, before: int) -> tuple[int, int, int, int, int, int]:
    raw = read(offset, _END64.size) if offset + _END64.size <= size else b""
    if len(raw) != _END64.size or raw[:4] != b"PK\x06\x06":
        offset = before - _LOCATOR64.size - _END64.size
        raw = read(offset, _END64.size) if offset >= 0 else b""
    if len(raw) != _END64.size or raw[:4] != b"PK\x06\x06":
        raise ArchiveError("a ZIP64 archive whose end record is missing")
    _, _, _, _, disk, first_disk, _, count, length, start = _END64.unpack(raw)
    return offset, disk, first_disk, count, length, start


def _parse_entries(directory: bytes, count: int, shift: int, data_end: int, limits: Limits) -> list[Member]:
    members: list[Member] = []
    position, total = 0, 0
    for index in range(count):
        if position + _ENTRY.size > len(directory) or directory[position : position + 4] != b"PK\x01\x02":
            raise ArchiveError("a zip whose directory is damaged")
        entry = _ENTRY.unpack_from(directory, position)
        flags, method = entry[5], entry[6]
        crc, packed, unpacked = entry[9], entry[10], entry[11]
        name_length, extra_length, comment_length, disk = entry[12], entry[13], entry[14], entry[15]
        offset = entry[18]
        name_at = position + _ENTRY.size
        raw_name = directory[name_at : name_at + name_length]
        extra = directory[name_at + name_length : name_at + name_length + extra_length]
        position = name_at + name_length + extra_length + comment_length
        if position > len(directory):
            raise ArchiveError("a zip whose directory is damaged")
        packed, unpacked, offset, disk = _widen(extra, unpacked, packed, offset, disk)
        name = raw_name.decode("utf-8" if flags & 0x800 else "cp437", errors="replace")
        if name.endswith("/"):
            continue
        total += unpacked
        offset += shift
        member = Member(index, name, packed, unpacked, crc, method, offset, 0, "")
        members.append(replace(member, refusal=_refusal(member, flags, disk, data_end, limits)))
    if total > limits.total_bytes:
        raise ArchiveError(f"a zip that would unpack to {total >> 30} GiB", "It looks like a zip bomb; do not use it.")
    _refuse_overlaps(members)
    return members


def _widen(extra: bytes, unpacked: int, packed: int, offset: int, disk: int) -> tuple[int, int, int, int]:
    """ZIP64 extended information (APPNOTE 4.5.3): 64-bit values stand in for those that are all ones, in this order."""
    values = {"unpacked": unpacked, "packed": packed, "offset": offset}
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        field = extra[at + 4 : at + 4 + length]
        if kind == 1:
            place = 0
            for key, value in values.items():
                if value == 0xFFFFFFFF:
                    if place + 8 > len(field):
                        raise ArchiveError("a zip whose directory is damaged")
                    (values[key],) = struct.unpack_from("<Q", field, place)
                    place += 8
            if disk == 0xFFFF:
                disk = 0
        at += 4 + length
    return values["packed"], values["unpacked"], values["offset"], disk


def _refusal(member: Member, flags: int, disk: int, data_end: int, limits: Limits) -> str:
    """Why a member is not read, or an empty string."""
    packed, unpacked, method = member.compressed_size, member.size, member.method
    if flags & 0x2041:
        return "encrypted: decrypt the archive first"
    if method not in (STORED, DEFLATED):
        return f"compressed with {_METHODS.get(method, f'method {method}')}: repack with deflate"
    if ".." in member.name.replace("\\", "/").split("/"):
        return "its name climbs out of the archive: repack without '..'"
    if disk or member.offset < 0 or member.offset + LOCAL_HEADER.size + packed > data_end:
        return "it lies outside of the file: the archive is truncated"
    if method == STORED and packed != unpacked:
        return "its two sizes contradict each other: the archive is damaged"
    if unpacked > limits.member_bytes:
        return f"it claims {unpacked >> 20} MiB, more than any image"
    if unpacked > limits.ratio_from and unpacked > limits.ratio * max(packed, 1):
        return f"it claims {unpacked >> 20} MiB from {packed >> 10} KiB: a zip bomb"
    return ""


def _refuse_overlaps(members: list[Member]) -> None:
    """Members that share bytes are the mark of a bomb (many names, one body)."""
    ranges = sorted((m.offset, m.offset + LOCAL_HEADER.size + m.compressed_size) for m in members if not m.refusal)
    for (_, end), (start, _) in pairwise(ranges):
        if start < end:
            raise ArchiveError("a zip whose members overlap each other", "It looks like a zip bomb; do not use it.")
