"""The frame header of a JPEG-LS stream, and its end: proved before decoding (ISO/IEC 14495-1 annex C).

CharLS takes seconds to refuse a stream whose bits end without a marker. One without its end marker is not mended: with
a marker put behind cut bits, CharLS can return wrong pixels (a run that lost its last byte).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

_SOF, _SOS, _EOI = 0xF7, 0xDA, 0xD9
_RESTART = range(0xD0, 0xD8)
_MARKER = re.compile(rb"\xff+([\x80-\xfe])")
"""Within coded bits a 0xFF is followed by a stuffed zero bit, so that none of these can occur (A.1)."""


@dataclass(frozen=True, slots=True)
class JpeglsStream:
    """A greyscale stream: its size, and its bytes up to and with the end marker, or nothing where that is missing."""

    rows: int
    columns: int
    whole: bytes


def parse_jpegls(stream: bytes) -> JpeglsStream:
    """Read the markers of a stream of one component and one scan; raises ValueError for anything else."""
    if stream[:2] != b"\xff\xd8":
        raise ValueError("no JPEG-LS start marker")
    position, size = 2, (0, 0)
    while True:
        if position + 4 > len(stream) or stream[position] != 0xFF:
            raise ValueError("damaged JPEG-LS markers")
        marker = stream[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        (length,) = struct.unpack_from(">H", stream, position + 2)
        body = stream[position + 4 : position + 2 + length]
        if length < 2 or len(body) != length - 2:
            raise ValueError("a JPEG-LS marker segment is cut short")
        position += 2 + length
        if marker == _SOF:
            if len(body) != 9 or body[5] != 1:
                raise ValueError("not a JPEG-LS image of one component")
            size = struct.unpack_from(">HH", body, 1)
        elif marker == _SOS:
            break
    if not size[0]:
        raise ValueError("no JPEG-LS frame header")
    return JpeglsStream(size[0], size[1], _up_to_end(stream, position))


def _up_to_end(stream: bytes, coded_from: int) -> bytes:
    """The stream without what follows its end marker, which is padding."""
    for found in _MARKER.finditer(stream, coded_from):
        marker = found.group(1)[0]
        if marker == _EOI:
            return stream[: found.end()]
        if marker not in _RESTART:
            raise ValueError("damaged JPEG-LS data")
    return b""
