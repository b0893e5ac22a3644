"""JPEG through libjpeg-turbo, with the proof that the stream was whole (ISO/IEC 10918-1 annexes B, F and H).

libjpeg fills what a truncated stream lacks and only warns, on a channel that nobody reads. For lossless JPEG the last
differences of the decoded image, encoded again, must be the last bits of the stream. Where that cannot be shown, and
for lossy JPEG always, a second decode with other bits appended decides: behind a whole image they change nothing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

_SOF_LOSSLESS = 0xC3
_SOF_READ = frozenset({0xC0, 0xC1, _SOF_LOSSLESS})
_NO_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})
_PROOF_BITS = 64
_FILLER = bytes(0xB6 ^ (i * 73 % 64) for i in range(256))
"""Starts with a one, where libjpeg fills with zeros, and holds no 0xFF, which would be a marker."""


HuffmanCodes = dict[int, tuple[int, int]]
"""Category to (bits, code)."""


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """Content of the markers before the entropy-coded data."""

    rows: int
    columns: int
    precision: int
    lossless: bool
    predictor: int
    point_transform: int
    codes: HuffmanCodes
    entropy_start: int


def parse_jpeg_header(stream: bytes) -> JpegHeader:
    """Read markers up to the first scan; raises ValueError where this is no sequential greyscale JPEG."""
    if stream[:2] != b"\xff\xd8":
        raise ValueError("no JPEG start marker")
    position, frame, sof = 2, b"", 0
    tables: dict[int, HuffmanCodes] = {}
    while True:
        if position + 4 > len(stream) or stream[position] != 0xFF:
            raise ValueError("damaged JPEG markers")
        marker = stream[position + 1]
        if marker == 0xFF:
            position += 1
            continue
        if marker in _NO_LENGTH:
            position += 2
            continue
        (length,) = struct.unpack_from(">H", stream, position + 2)
        body = stream[position + 4 : position + 2 + length]
        if len(body) != length - 2:
            raise ValueError("a JPEG marker segment is cut short")
        position += 2 + length
        if marker == 0xC4:
            tables.update(_huffman_codes(body))
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            sof, frame = marker, body
        elif marker == 0xDA:
            break
    if sof not in _SOF_READ or len(frame) < 9 or frame[5] != 1 or len(body) != 6:
        raise ValueError("not a sequential or lossless Huffman JPEG of one component")
    return JpegHeader(
        rows=int.from_bytes(frame[1:3], "big"),
        columns=int.from_bytes(frame[3:5], "big"),
        precision=frame[0],
        lossless=sof == _SOF_LOSSLESS,
        predictor=body[3],
        point_transform=body[5] & 15,
        codes=tables.get(body[2] >> 4, {}),
        entropy_start=position,
    )


def _huffman_codes(body: bytes) -> dict[int, HuffmanCodes]:
    """The DC/lossless tables of a DHT segment, by their number (annex C)."""
    found: dict[int, HuffmanCodes] = {}
    at = 0
    while at + 17 <= len(body):
        kind, counts = body[at], body[at + 1 : at + 17]
        values = body[at + 17 : at + 17 + sum(counts)]
        if len(values) != sum(counts):
            raise ValueError("a JPEG Huffman table is cut short")
        at += 17 + len(values)
        if kind >> 4:
            continue
        table, code, place = {}, 0, 0
        for bits, count in enumerate(counts, 1):
            for value in values[place : place + count]:
                table[value] = (bits, code)
                code += 1
            place += count
            code <<= 1
        found[kind & 15] = table
    return found


def decode_jpeg(stream: bytes, header: JpegHeader, out: NDArray[np.uint16] | None = None) -> tuple[NDArray[Any], bool]:
    """Decode a greyscale JPEG of 8, 12 or (lossless) up to 16 bits.

    Args:
        out: (rows, columns) to decode into where samples have more than 8 bits; saves asking for fresh memory.

    Returns:
        The samples (rows, columns) and whether the stream held all of them.

    Raises:
        ValueError, RuntimeError: Not such a JPEG.
    """
    end = stream.rfind(b"\xff\xd9", max(header.entropy_start, len(stream) - 64))
    if end >= 0:
        body = stream[:end]
    else:
        # Without an end marker, zeros behind the last byte are padding, unless they stuff a 0xFF.
        body = stream.rstrip(b"\0")
        body += b"\0" if body.endswith(b"\xff") else b""
    into = {} if out is None or header.precision <= 8 else {"out": out}
    cells: NDArray[Any] = imagecodecs.jpeg8_decode(body + b"\xff\xd9", **into)
    if header.lossless and _ends_with_last_samples(header, body, cells):
        return cells, True
    extended: NDArray[Any] = imagecodecs.jpeg8_decode(body + _FILLER + b"\xff\xd9")
    return cells, bool(np.array_equal(cells, extended))


def _ends_with_last_samples(header: JpegHeader, body: bytes, cells: NDArray[Any]) -> bool:
    """Whether the stream ends with the code of the last samples; False means doubt, not guilt.

    Goes back over enough samples to make a chance match impossible, and past any run of equal differences, since a
    decoder's fill is such a run.
    """
    if cells.ndim != 2 or cells.shape[0] < 2 or cells.shape[1] < 2:
        return False
    shift = header.point_transform
    last = (cells[-1] >> shift).astype(np.int64)
    above = (cells[-2] >> shift).astype(np.int64)
    predicted = _predict(header.predictor, last[:-1], above[1:], above[:-1])
    untouched = last[0] == 1 << (header.precision - shift - 1) and bool((last == last[0]).all())
    if predicted is None or untouched:
        return False
    differences = ((last[1:] - predicted + 32767) & 0xFFFF) - 32767
    tail, bits = 0, 0
    for place in range(len(differences) - 1, -1, -1):
        value = int(differences[place])
        category = abs(value).bit_length()
        if category not in header.codes:
            return False
        length, code = header.codes[category]
        if 0 < category < 16:
            code = code << category | (value if value > 0 else value + (1 << category) - 1)
            length += category
        tail |= code << bits
        bits += length
        if bits >= _PROOF_BITS and value != differences[-1]:
            break
    if bits < _PROOF_BITS:
        return False
    window = body[-(bits // 8 + 2) * 2 :].replace(b"\xff\0", b"\xff")
    stream_tail = int.from_bytes(window, "big")
    # The last byte is padded with ones, up to seven (F.1.2.3).
    for padding in range(8):
        if stream_tail & ((1 << bits) - 1) == tail and padding + bits <= 8 * len(window):
            return True
        if not stream_tail & 1:
            return False
        stream_tail >>= 1
    return False


def _predict(
    selection: int, left: NDArray[np.int64], above: NDArray[np.int64], corner: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """Predictors of ISO/IEC 10918-1 table H.1."""
    match selection:
        case 1:
            return left
        case 2:
            return above
        case 3:
            return corner
        case 4:
            return left + above - corner
        case 5:
            return left + ((above - corner) >> 1)
        case 6:
            return above + ((left - corner) >> 1)
        case 7:
            return (left + above) >> 1
    return None
