"""Frames of JPEG 2000 codestreams (ISO/IEC 15444-1 annex A), mended and checked so that a strict decoder can judge."""

from __future__ import annotations

import struct
from collections import Counter
from typing import NamedTuple

_SOC, _SIZ, _SOT, _EOC = b"\xff\x4f", b"\xff\x51", b"\xff\x90", b"\xff\xd9"
_PSOT_AT = 6
_SOT_SIZE = 12
_SIZ_FIELDS = struct.Struct(">8I")
"""Xsiz, Ysiz, XOsiz, YOsiz, XTsiz, YTsiz, XTOsiz, YTOsiz, which begin _SIZ_AT bytes behind the start of SOC."""
_SIZ_AT = 8


NO_PACKET = b"\xfe" * 8
"""Bytes that, read as a packet (B.10), announce more data than they hold."""


class _TilePart(NamedTuple):
    """A tile-part: its offset, its tile, and the stated number of that tile's parts (0: not stated)."""

    start: int
    tile: int
    parts: int


def mend_codestream(stream: bytes, after: bytes = b"") -> bytes:
    """A codestream whose last tile-part ends where the data end.

    Some scanners write a tile-part length (Psot) that overshoots, or leave the end marker out; decoders then refuse, or
    return zeros. The data decide: with the length set to what is there, a strict decoder accepts whole packets and
    refuses cut ones. Streams whose lengths are in order, streams that end within a tile-part's header, and JP2 files
    come back unchanged.

    Args:
        after: Put behind the last tile-part's data and counted as part of them. A decoder that has had every packet
            passes over it; one that still waits for packets takes it for the next. :data:`NO_PACKET` tells the two.
    """
    parts, end_of_parts = _tile_parts(stream)
    if not parts or stream[end_of_parts : end_of_parts + 2] == _EOC:
        return stream
    last = parts[-1].start
    end = len(stream) if stream.endswith(_EOC) else stream.rfind(_EOC, max(last, len(stream) - 64)) + 2
    body = stream[: end - 2] if end >= 2 else stream
    if len(body) < last + _SOT_SIZE:
        return stream
    mended = bytearray(body + after + _EOC)
    struct.pack_into(">I", mended, last + _PSOT_AT, len(body) + len(after) - last)
    return bytes(mended)


def has_every_tile(stream: bytes) -> bool:
    """Whether every tile, and every part that a tile states, begins; JP2 files are taken to be whole.

    A decoder leaves the place of a missing tile empty without a word. Raises ValueError where there is no SIZ marker.
    """
    if not stream.startswith(_SOC):
        return True
    parts, _ = _tile_parts(stream)
    right, bottom, _, _, width, height, left, top = _image_and_tiles(stream)
    if not width or not height:
        return False
    counts = Counter(part.tile for part in parts)
    wanted = -(-(right - left) // width) * -(-(bottom - top) // height)
    return len(counts) == wanted and all(counts[part.tile] >= part.parts for part in parts)


def _tile_parts(stream: bytes) -> tuple[list[_TilePart], int]:
    """The tile-parts of a codestream in order, and where the last of them ends."""
    found: list[_TilePart] = []
    position = stream.find(_SOT) if stream.startswith(_SOC) else -1
    while position >= 0 and stream[position : position + 2] == _SOT and position + _SOT_SIZE <= len(stream):
        tile, length, _, parts = struct.unpack_from(">HIBB", stream, position + 4)
        found.append(_TilePart(position, tile, parts))
        if length < _SOT_SIZE:
            break
        position += length
    return found, position


def codestream_size(stream: bytes) -> tuple[int, int]:
    """Rows and columns from the SIZ marker (ISO/IEC 15444-1 A.5.1); raises ValueError where there is none."""
    width, height, left, top = _image_and_tiles(stream)[:4]
    return height - top, width - left


def _image_and_tiles(stream: bytes) -> tuple[int, ...]:
    start = stream.find(_SOC + _SIZ, 0, 4096)
    if start < 0 or len(stream) < start + _SIZ_AT + _SIZ_FIELDS.size:
        raise ValueError("no JPEG 2000 codestream")
    return _SIZ_FIELDS.unpack_from(stream, start + _SIZ_AT)
