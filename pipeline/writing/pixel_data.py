"""Pixel data of one slice as DICOM carries it: native little endian, or one lossless frame, encapsulated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import UID, ExplicitVRLittleEndian, HTJ2KLossless, JPEGLSLossless

from latentcache import InputError

TRANSFER_SYNTAXES: dict[str, UID] = {
    "explicit": ExplicitVRLittleEndian,
    "jpegls": JPEGLSLossless,
    "htj2k": HTJ2KLossless,
}


def transfer_syntax_uid(name: str) -> UID:
    """UID of ``explicit``, ``jpegls`` or ``htj2k``; all three are lossless."""
    if name not in TRANSFER_SYNTAXES:
        raise InputError(
            f"transfer syntax {name!r}",
            expected=f"one of {', '.join(TRANSFER_SYNTAXES)}",
            remedy="Give --transfer-syntax explicit, jpegls or htj2k.",
        )
    return TRANSFER_SYNTAXES[name]


@dataclass(frozen=True)
class PixelFormat:
    """Relation of stored values to HU: ``HU = slope * stored + intercept`` (DICOM PS3.3 C.11.1).

    Native series store HU itself, signed. Compressed ones are stored unsigned above an intercept, since the coders
    predict on unsigned samples and readers differ in how they sign-extend. ``offset`` is the lowest stored value's.
    """

    signed: bool
    offset: int
    slope: float = 1.0

    @classmethod
    def of(cls, hu: NDArray[np.int16], syntax: str, slope: float = 1.0) -> PixelFormat:
        """The format for a volume; ``hu`` is (z, y, x) int16 in units of ``slope`` HU."""
        if syntax == "explicit":
            return cls(signed=True, offset=0, slope=slope)
        return cls(signed=False, offset=min(-1024, int(hu.min())), slope=slope)

    @property
    def intercept(self) -> float:
        """RescaleIntercept in HU."""
        return self.offset * self.slope

    def stored(self, slice_hu: NDArray[np.int16]) -> NDArray[Any]:
        """One slice as stored values, contiguous little endian 16 bit."""
        if self.signed and self.offset == 0:
            return np.ascontiguousarray(slice_hu, dtype="<i2")
        # Unsigned 16-bit arithmetic wraps, so this is exact for every int16 above the intercept.
        return np.ascontiguousarray(slice_hu).view(np.uint16) - np.uint16(self.offset & 0xFFFF)


def encode_frame(stored: NDArray[Any], syntax: str) -> bytes:
    """Losslessly compress one frame (rows, columns) uint16 as JPEG-LS (ISO 14495-1) or HTJ2K (ISO 15444-15)."""
    import imagecodecs

    if syntax == "jpegls":
        return bytes(imagecodecs.jpegls_encode(stored, level=0))
    return bytes(imagecodecs.htj2k_encode(stored, reversible=True))


def pixel_element(stored: NDArray[Any], syntax: str) -> tuple[bytes, memoryview | bytes]:
    """The PixelData element (7FE0,0010) as header and value, native or encapsulated (DICOM PS3.5 8.2, A.4)."""
    tag = b"\xe0\x7f\x10\x00"
    if syntax == "explicit":
        raw = stored.data.cast("B")
        odd = len(raw) % 2
        return tag + b"OW\x00\x00" + (len(raw) + odd).to_bytes(4, "little"), bytes(raw) + b"\0" if odd else raw
    frame = encode_frame(stored, syntax)
    frame += b"\0" * (len(frame) % 2)
    item = b"\xfe\xff\x00\xe0"
    empty_offset_table = item + bytes(4)
    body = empty_offset_table + item + len(frame).to_bytes(4, "little") + frame + b"\xfe\xff\xdd\xe0" + bytes(4)
    return tag + b"OB\x00\x00\xff\xff\xff\xff", body


def frames_element(frames: Iterator[NDArray[Any]], count: int, frame_bytes: int, syntax: str) -> Iterator[Any]:
    """PixelData of a multi-frame image piece by piece: native, or a fragment a frame behind an empty offset table.

    Args:
        frames: Stored values, (rows, columns) each, in frame order.
        frame_bytes: Bytes of one native frame.
    """
    tag = b"\xe0\x7f\x10\x00"
    if syntax == "explicit":
        odd = count * frame_bytes % 2
        yield tag + b"OW\x00\x00" + (count * frame_bytes + odd).to_bytes(4, "little")
        for frame in frames:
            yield frame.data.cast("B")
        yield b"\0" * odd
        return
    yield tag + b"OB\x00\x00\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0" + bytes(4)
    for frame in frames:
        raw = encode_frame(frame, syntax)
        raw += b"\0" * (len(raw) % 2)
        yield b"\xfe\xff\x00\xe0" + len(raw).to_bytes(4, "little") + raw
    yield b"\xfe\xff\xdd\xe0" + bytes(4)
