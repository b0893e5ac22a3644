"""One member of a zip: where its bytes lie, and inflating them under the limits of what the directory declared."""

from __future__ import annotations

from collections.abc import Iterator

from isal import isal_zlib

from pipeline.zip_directory import LOCAL_HEADER, STORED, ArchiveError, Member

_PIECE = 1 << 15
LOCAL_NAME_SPARE = 1024
"""Bytes read beyond a member's local header for its name and extra field, so that one range usually suffices."""


def head_range(member: Member, limit: int) -> tuple[int, int]:
    """Bytes of the archive that surely hold the first ``limit`` bytes of a member (deflate expands by 5 in 16 K)."""
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


def inflate_head(member: Member, raw: bytes, limit: int) -> bytes:
    """The first ``limit`` bytes of a member, from the bytes of the archive that `head_range` names."""
    packed = memoryview(raw)[body_start(member, raw) :][: member.compressed_size]
    if member.method == STORED:
        return bytes(packed[:limit])
    try:
        head: bytes = isal_zlib.decompressobj(-15).decompress(packed, min(limit, max(member.size, 1)))
    except isal_zlib.error:
        raise ArchiveError("a member whose compressed data are damaged") from None
    return head


def inflated(member: Member, packed: memoryview) -> Iterator[bytes]:
    """The content piece by piece, never more than the declared size: a bomb that lies about it fails."""
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
