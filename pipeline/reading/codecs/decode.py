"""One frame of pixel data to stored values, for every transfer syntax that CT archives use (PS3.5 8, 10 and A).

Decoders that pad a truncated stream in silence are not trusted: this module proves that a stream is whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.reading.codecs.jpeg import decode_jpeg, parse_jpeg_header
from pipeline.reading.codecs.jpeg2000 import NO_PACKET, codestream_size, has_every_tile, mend_codestream
from pipeline.reading.codecs.jpegls import parse_jpegls

NATIVE = {
    "1.2.840.10008.1.2": "Implicit VR Little Endian",
    "1.2.840.10008.1.2.1": "Explicit VR Little Endian",
    "1.2.840.10008.1.2.2": "Explicit VR Big Endian",
    "1.2.840.10008.1.2.1.99": "Deflated Explicit VR Little Endian",
}
RLE = "1.2.840.10008.1.2.5"
JPEG_LOSSY = {
    "1.2.840.10008.1.2.4.50": "JPEG Baseline (Process 1)",
    "1.2.840.10008.1.2.4.51": "JPEG Extended (Process 2 and 4)",
}
JPEG_LOSSLESS = {
    "1.2.840.10008.1.2.4.57": "JPEG Lossless (Process 14)",
    "1.2.840.10008.1.2.4.70": "JPEG Lossless (Process 14, Selection Value 1)",
}
JPEG_LS = {
    "1.2.840.10008.1.2.4.80": "JPEG-LS Lossless",
    "1.2.840.10008.1.2.4.81": "JPEG-LS Near-Lossless",
}
JPEG_2000 = {
    "1.2.840.10008.1.2.4.90": "JPEG 2000 Lossless",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.201": "HTJ2K Lossless",
    "1.2.840.10008.1.2.4.202": "HTJ2K Lossless RPCL",
    "1.2.840.10008.1.2.4.203": "HTJ2K",
}
READABLE: dict[str, str] = NATIVE | {RLE: "RLE Lossless"} | JPEG_LOSSY | JPEG_LOSSLESS | JPEG_LS | JPEG_2000
_REFUSED = {
    "1.2.840.10008.1.2.4.52": "JPEG Extended (Process 3 and 5)",
    "1.2.840.10008.1.2.4.53": "JPEG Spectral Selection (Process 6 and 8)",
    "1.2.840.10008.1.2.4.54": "JPEG Spectral Selection (Process 7 and 9)",
    "1.2.840.10008.1.2.4.55": "JPEG Full Progression (Process 10 and 12)",
    "1.2.840.10008.1.2.4.56": "JPEG Full Progression (Process 11 and 13)",
    "1.2.840.10008.1.2.4.92": "JPEG 2000 Part 2 Multi-component Lossless",
    "1.2.840.10008.1.2.4.93": "JPEG 2000 Part 2 Multi-component",
    "1.2.840.10008.1.2.4.94": "JPIP Referenced",
    "1.2.840.10008.1.2.4.95": "JPIP Referenced Deflate",
    "1.2.840.10008.1.2.4.100": "MPEG2 Main Profile",
    "1.2.840.10008.1.2.4.101": "MPEG2 Main Profile High Level",
    "1.2.840.10008.1.2.4.102": "MPEG-4 AVC/H.264",
    "1.2.840.10008.1.2.4.107": "HEVC/H.265",
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame",
}
LOSSY_SYNTAXES = frozenset(JPEG_LOSSY) | {
    "1.2.840.10008.1.2.4.81", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.203",
}  # fmt: skip


class PixelError(InputError):
    """Pixel data that cannot be decoded faithfully."""

    def __init__(self, found: str, remedy: str = "Export the series again from its archive.") -> None:
        super().__init__(found, expected="whole pixel data in a supported form", remedy=remedy)

    def __reduce__(self) -> tuple[object, ...]:
        return (PixelError, (self.found, self.remedy))


@dataclass(frozen=True, slots=True)
class SampleFormat:
    """Layout of stored values in a frame (PS3.3 C.7.6.3.1)."""

    rows: int
    columns: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool

    @property
    def frame_bytes(self) -> int:
        return self.rows * self.columns * (self.bits_allocated // 8)

    @property
    def stored_range(self) -> tuple[int, int]:
        if self.signed:
            return -(1 << (self.bits_stored - 1)), (1 << (self.bits_stored - 1)) - 1
        return 0, (1 << self.bits_stored) - 1

    def refusal(self) -> str:
        """Why frames of this form are not read, or an empty string."""
        if self.bits_allocated not in (8, 16):
            return f"{self.bits_allocated} bits allocated a pixel; 8 and 16 are read"
        if not 1 <= self.bits_stored <= self.bits_allocated or not self.bits_stored - 1 <= self.high_bit:
            return f"{self.bits_stored} bits stored below high bit {self.high_bit} contradict each other"
        if self.high_bit >= self.bits_allocated:
            return f"high bit {self.high_bit} lies outside of {self.bits_allocated} bits"
        if not (0 < self.rows <= 8192 and 0 < self.columns <= 8192):
            return f"an image of {self.rows} x {self.columns} pixels"
        return ""


def refused_syntax(syntax: str) -> str:
    """Name of a transfer syntax that is not read, or an empty string."""
    return "" if syntax in READABLE else _REFUSED.get(syntax, f"with UID {syntax}")


def native_frame(data: bytes | memoryview, form: SampleFormat, *, little: bool, words_of_bytes: bool) -> NDArray[Any]:
    """Stored values (rows, columns) of an uncompressed frame, high bits cleared or sign-extended.

    Args:
        words_of_bytes: 8-bit pixels inside big-endian OW words, whose bytes are swapped pairwise (PS3.5 8.1.1).
    """
    if form.bits_allocated == 8:
        cells: NDArray[Any] = np.frombuffer(data, dtype=np.uint8, count=form.rows * form.columns)
        if words_of_bytes and not little:
            if cells.size % 2:
                raise PixelError("an odd number of 8-bit pixels in big-endian words")
            cells = cells.reshape(-1, 2)[:, ::-1].reshape(-1)
    else:
        cells = np.frombuffer(data, dtype="<u2" if little else ">u2", count=form.rows * form.columns)
    return clean_bits(cells.reshape(form.rows, form.columns), form)


def clean_bits(cells: NDArray[Any], form: SampleFormat) -> NDArray[Any]:
    """Unsigned cells to stored values: drop what is above the high bit (overlays), extend the sign."""
    above = form.bits_allocated - 1 - form.high_bit
    below = form.high_bit + 1 - form.bits_stored
    native = cells.astype(np.uint8 if form.bits_allocated == 8 else np.uint16, copy=False)
    if form.signed:
        signed = native.view(np.int8 if form.bits_allocated == 8 else np.int16)
        if above or below:
            signed = np.right_shift(np.left_shift(signed, above), above + below)
        return signed
    if below:
        native = np.right_shift(native, below)
    return np.bitwise_and(native, (1 << form.bits_stored) - 1) if above or below else native


def encapsulated_frame(
    stream: bytes, syntax: str, form: SampleFormat, out: NDArray[np.uint16] | None = None
) -> NDArray[Any]:
    """Decode one compressed frame to stored values (rows, columns).

    Args:
        out: Of the frame's shape; a codec that can decodes into it, and the values returned may be a view of it.

    Raises:
        PixelError: Truncated or damaged, of another size than declared, or not a greyscale image.
    """
    try:
        if syntax == RLE:
            cells = _decode_rle(stream, form)
        elif syntax in JPEG_LOSSLESS or syntax in JPEG_LOSSY:
            cells = _decode_jpeg(stream, form, out)
        elif syntax in JPEG_LS:
            cells = _decode_jpegls(stream, form)
        elif syntax in JPEG_2000:
            _same_size(codestream_size(stream), form)
            cells = _decode_jpeg2000(stream)
        else:
            raise PixelError(f"transfer syntax {refused_syntax(syntax)}", "Convert the series to a supported one.")
    except PixelError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise PixelError(f"a compressed frame that its decoder refuses ({type(error).__name__})") from None
    _same_size(cells.shape, form)
    return _as_stored(cells, form)


def _as_stored(cells: NDArray[Any], form: SampleFormat) -> NDArray[Any]:
    """Bring a decoder's output to stored values: JPEG and JPEG-LS know no sign, JPEG 2000 does."""
    wide = np.uint8 if form.bits_allocated == 8 else np.uint16
    if cells.dtype.kind == "i":
        low, high = int(cells.min()), int(cells.max())
        if not form.signed and low < 0:
            raise PixelError("a signed codestream in an image that is declared unsigned")
        if low < np.iinfo(np.int16).min or high > np.iinfo(wide).max:
            raise PixelError("a compressed frame with more bits than are allocated")
        # Four bytes say that a stream holds more than BitsStored declares, see `exceeds_declared`.
        beyond = low < form.stored_range[0] or high > form.stored_range[1]
        return cells.astype(np.int32) if beyond else cells.astype(np.int16, copy=False) if form.signed else cells
    if cells.dtype.itemsize > np.dtype(wide).itemsize:
        if int(cells.max()) > np.iinfo(wide).max:
            raise PixelError("a compressed frame with more bits than are allocated")
        cells = cells.astype(wide)
    return clean_bits(cells.astype(wide, copy=False), form)


def exceeds_declared(stored: NDArray[Any]) -> bool:
    """Whether a codestream gave values that BitsStored does not allow, so that the declared range is no bound."""
    return stored.dtype.itemsize > 2


def _same_size(size: tuple[int, ...], form: SampleFormat) -> None:
    """Asked before decoding too: a stream that claims more than its image must not get the memory for it."""
    if size != (form.rows, form.columns):
        shape = " x ".join(str(n) for n in size)
        raise PixelError(f"a compressed frame of {shape} where {form.rows} x {form.columns} are declared")


def _decode_jpeg2000(stream: bytes) -> NDArray[Any]:
    mended = mend_codestream(stream)
    if not has_every_tile(mended):
        raise PixelError("a JPEG 2000 stream without all of its tiles")
    cells: NDArray[Any] = imagecodecs.jpeg2k_decode(mended, numthreads=1)
    if mended is not stream:
        # Cut between two packets, a stream is a sound one of a coarser image: the decoder must not wait for more.
        imagecodecs.jpeg2k_decode(mend_codestream(stream, after=NO_PACKET), numthreads=1)
    return cells


def _decode_jpeg(stream: bytes, form: SampleFormat, out: NDArray[np.uint16] | None) -> NDArray[Any]:
    header = parse_jpeg_header(stream)
    _same_size((header.rows, header.columns), form)
    cells, whole = decode_jpeg(stream, header, out)
    if not whole:
        raise PixelError("a JPEG stream that is cut short")
    return cells


def _decode_jpegls(stream: bytes, form: SampleFormat) -> NDArray[Any]:
    frame = parse_jpegls(stream)
    _same_size((frame.rows, frame.columns), form)
    if not frame.whole:
        raise PixelError("a JPEG-LS stream that is cut short")
    cells: NDArray[Any] = imagecodecs.jpegls_decode(frame.whole)
    return cells


def _decode_rle(stream: bytes, form: SampleFormat) -> NDArray[Any]:
    """RLE segments hold the bytes of the pixels, most significant first (PS3.5 annex G)."""
    planes = form.bits_allocated // 8
    header = np.frombuffer(stream, dtype="<u4", count=16) if len(stream) >= 64 else np.zeros(16, np.uint32)
    if int(header[0]) != planes:
        raise PixelError(f"an RLE frame with {int(header[0])} segments where {planes} are expected")
    pixels = form.rows * form.columns
    bounds = [int(v) for v in header[1 : planes + 1]] + [len(stream)]
    if bounds[0] < 64 or any(b <= a for a, b in pairwise(bounds)):
        raise PixelError("an RLE frame whose segment offsets are out of order")
    cells = np.empty((pixels, planes), np.uint8)
    for plane in range(planes):
        segment = imagecodecs.packbits_decode(stream[bounds[plane] : bounds[plane + 1]])
        # A segment may be padded to an even length, which can decode to a few bytes more.
        if not pixels <= len(segment) <= pixels + 2:
            raise PixelError("an RLE segment that is cut short or too long")
        cells[:, planes - 1 - plane] = np.frombuffer(segment, np.uint8, count=pixels)
    return cells.view("<u2" if planes == 2 else np.uint8).reshape(form.rows, form.columns)
