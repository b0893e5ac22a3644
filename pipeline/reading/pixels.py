"""The pixels of one frame inside a file: found, cut out, decoded to stored values (PS3.5 8.2 and A.4)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.archive import Source
from pipeline.reading.codecs import NATIVE, PixelError, encapsulated_frame, exceeds_declared, native_frame
from pipeline.reading.header import DEFLATED, Header, PixelElement, find_pixels, inflate_data_set
from pipeline.reading.instance import Instance

AIR_HU = -1024
IMPLAUSIBLE_BELOW_HU = -1500
"""No CT measures this; scanners write such values outside of the field of view, often without saying so."""
_PADDING_BELOW_HU, _PADDING_ABOVE_HU = -900, 4000
"""A padding value between these is also tissue, so that replacing it would punch holes into the patient."""


def hu_dtype(instances: Iterable[Instance]) -> np.dtype[Any]:
    """int16 where every slope and intercept is a whole number, else float32."""
    whole = all(float(one.slope or 0).is_integer() and float(one.intercept or 0).is_integer() for one in instances)
    return np.dtype(np.int16 if whole else np.float32)


def rescale_into(stored: NDArray[Any], one: Instance, slot: NDArray[Any]) -> frozenset[str]:
    """Write the HU of one frame into ``slot`` (rows, columns), int16 or float32.

    Returns:
        Facts: ``padding`` (declared padding became air), ``padding-ignored`` (declared, but a tissue value),
        ``padding-untagged`` (values below any CT number became air), ``saturated`` (clipped to int16),
        ``beyond-bits-stored`` (a codestream held more than BitsStored declares).
    """
    slope, intercept = float(one.slope or 0), float(one.intercept or 0)
    facts = {"beyond-bits-stored"} if exceeds_declared(stored) else set()
    if slot.dtype == np.float32:
        slot[...] = stored * slope + intercept  # float64, as the standard's arithmetic, rounded once
    elif _rescale_int16(stored, int(slope), int(intercept), one.form.stored_range, slot):
        facts.add("saturated")
    if one.padding is not None:
        facts |= _pad(stored, one.padding, slope, intercept, slot)
    if slot.min() < IMPLAUSIBLE_BELOW_HU:
        slot[slot < IMPLAUSIBLE_BELOW_HU] = AIR_HU
        facts.add("padding-untagged")
    return frozenset(facts)


def _rescale_int16(
    stored: NDArray[Any], slope: int, intercept: int, stored_range: tuple[int, int], slot: NDArray[Any]
) -> bool:
    """Returns whether values had to be clipped."""
    limits = np.iinfo(np.int16)
    ends = [slope * v + intercept for v in stored_range]
    whole_range_fits = limits.min <= min(ends) and max(ends) <= limits.max and stored_range[1] <= limits.max
    whole_range_fits = whole_range_fits and not exceeds_declared(stored)
    if slope == 1 and whole_range_fits and limits.min <= intercept <= limits.max:
        np.add(stored.view(np.int16) if stored.dtype == np.uint16 else stored, np.int16(intercept), out=slot)
        return False
    wide = stored.astype(np.int64) * slope + intercept
    low, high = int(wide.min()), int(wide.max())
    # What lies below any CT number becomes air in a moment, so only the upper end can lose information.
    np.clip(wide, limits.min, limits.max, out=wide)
    slot[...] = wide
    return high > limits.max or (low < limits.min and low >= IMPLAUSIBLE_BELOW_HU)


def _pad(
    stored: NDArray[Any], padding: tuple[int, int], slope: float, intercept: float, slot: NDArray[Any]
) -> frozenset[str]:
    low, high = padding
    outside = stored == low if low == high else (stored >= low) & (stored <= high)
    if not outside.any():
        return frozenset()
    ends = sorted((low * slope + intercept, high * slope + intercept))
    if ends[1] > _PADDING_BELOW_HU and ends[0] < _PADDING_ABOVE_HU:
        return frozenset({"padding-ignored"})
    slot[outside] = AIR_HU
    return frozenset({"padding"})


def read_slice(source: Source, one: Instance) -> NDArray[np.generic]:
    """HU of a single frame (rows, columns), int16 or float32; raises InputError."""
    slot = np.empty((one.form.rows, one.form.columns), hu_dtype([one]))
    rescale_into(FrameReader(source.read(one.member), one).stored_values(one), one, slot)
    return slot


_ITEM, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE0DD)
_DATA_SET_SPARE = 64 << 20
"""Bytes that a deflated data set may hold beside its pixels."""


class FrameReader:
    """Decodes frames of one file that is already in memory. Not shared between threads while it is being built.

    Stored values may be a view of ``data``: use them before that is overwritten.
    """

    def __init__(self, data: bytes | memoryview, first: Instance) -> None:
        header = first.header
        refused = first.form.refusal()
        if refused:
            raise PixelError(refused)
        if header.syntax == DEFLATED:
            spare = first.form.frame_bytes * max(first.frames, 1) + _DATA_SET_SPARE
            data = inflate_data_set(memoryview(data)[header.deflated_from :], spare)
        self._data = data
        self._pixels = find_pixels(data, header)
        self._frames = max(first.frames, 1)
        self._native = header.syntax in NATIVE
        if self._native:
            _check_native_length(data, self._pixels, first, self._frames)
            self._streams: list[tuple[int, ...]] = []
        else:
            self._streams = _fragments_by_frame(data, header, self._pixels, self._frames)

    def stored_values(self, one: Instance, out: NDArray[np.uint16] | None = None) -> NDArray[Any]:
        """Stored values (rows, columns) of a frame; ``out`` as of `codecs.encapsulated_frame`.

        Raises:
            PixelError: Cut short, damaged, or of another size than declared.
        """
        if not 0 <= one.frame < self._frames:
            raise PixelError(f"frame {one.frame} asked of an image with {self._frames}")
        if self._native:
            size = one.form.frame_bytes
            start = self._pixels.offset + one.frame * size
            view = memoryview(self._data)[start : start + size]
            return native_frame(view, one.form, little=one.header.little, words_of_bytes=self._pixels.words)
        bounds = self._streams[one.frame]
        stream = b"".join([self._data[a:b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)])
        return encapsulated_frame(stream, one.header.syntax, one.form, out)


def _check_native_length(data: bytes | memoryview, pixels: PixelElement, first: Instance, frames: int) -> None:
    if pixels.length is None:
        raise PixelError("encapsulated pixel data under an uncompressed transfer syntax")
    expected = first.form.frame_bytes * frames
    there = min(pixels.length, len(data) - pixels.offset)
    if there < expected:
        raise PixelError(f"pixel data cut short: {there} of {expected} bytes")
    # One byte pads to an even length; more means that rows, columns or frames are not what the header says.
    if pixels.length > expected + 1:
        raise PixelError(f"pixel data longer than the image: {pixels.length} of {expected} bytes")


def _fragments_by_frame(
    data: bytes | memoryview, header: Header, pixels: PixelElement, frames: int
) -> list[tuple[int, ...]]:
    """For every frame the (start, end) offsets of its fragments, flat."""
    if pixels.length is not None:
        raise PixelError("pixel data without encapsulation under a compressed transfer syntax")
    items = _items(data, pixels.offset)
    if not items:
        raise PixelError("encapsulated pixel data without a single item")
    (table_start, table_end), fragments = items[0], items[1:]
    if not fragments:
        raise PixelError("encapsulated pixel data without fragments")
    if frames == 1:
        return [tuple(edge for fragment in fragments for edge in fragment)]
    if len(fragments) == frames:
        return list(fragments)
    count = (table_end - table_start) // 4
    if count != frames:
        raise PixelError(f"{len(fragments)} fragments for {frames} frames, and no offset table that tells them apart")
    base = fragments[0][0] - 8
    starts = [base + offset for offset in struct.unpack_from(f"<{count}I", data, table_start)]
    edges = [*starts, fragments[-1][1] + 8]
    grouped = []
    for low, high in pairwise(edges):
        own = tuple(edge for a, b in fragments if low <= a - 8 < high for edge in (a, b))
        if not own:
            raise PixelError("an offset table that points outside of the pixel data")
        grouped.append(own)
    return grouped


def _items(data: bytes | memoryview, position: int) -> list[tuple[int, int]]:
    """(start, end) of every item of encapsulated pixel data, always little endian."""
    items: list[tuple[int, int]] = []
    while position + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, position)
        position += 8
        if (group, element) == _SEQUENCE_END:
            return items
        if (group, element) != _ITEM:
            raise PixelError("encapsulated pixel data hold something else than items")
        if position + length > len(data):
            raise PixelError("encapsulated pixel data cut short")
        items.append((position, position + length))
        position += length
    # The end marker is missing; whether the last fragment is whole is for the codec to prove.
    return items
