"""Stepping from element to element through a data set, and over sequences, without parsing values (PS3.5 section 7)."""

from __future__ import annotations

import struct

from latentcache.errors import InputError

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
UNDEFINED = 0xFFFFFFFF
_MAX_NESTING = 32
LONG_VR = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
SHORT_VR = frozenset(
    {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS"}
    | {b"ST", b"TM", b"UI", b"UL", b"US"}
)  # PS3.5 table 7.1-2

_LITTLE = tuple(struct.Struct(form).unpack_from for form in ("<HH2sH", "<HHI", "<I"))
_BIG = tuple(struct.Struct(form).unpack_from for form in (">HH2sH", ">HHI", ">I"))
"""An explicit element's head (tag, VR, short length), an implicit one's (tag, length), and a long length (7.1)."""


class HeaderError(InputError):
    """A DICOM header that cannot be read."""

    def __init__(self, found: str) -> None:
        super().__init__(found, expected="a header as in DICOM PS3.5", remedy="Export the file again from its archive.")


class NeedMoreError(Exception):
    """The bytes at hand end before the wanted part of the header does; read more and try again."""


def walk(
    data: bytes | memoryview,
    position: int,
    found: dict[int, bytes],
    wanted: frozenset[int],
    last: int,
    explicit: bool,
    little: bool,
    whole: bool,
) -> int:
    """Collect wanted values up to tag ``last``; returns the offset of the first element behind it (or the end)."""
    size = len(data)
    explicit_of, implicit_of, long_of = _LITTLE if little else _BIG
    while True:
        if position + 8 > size:
            if whole and position == size:
                return position
            raise HeaderError("the header is cut short") if whole else NeedMoreError
        if explicit:
            group, element, vr, length = explicit_of(data, position)
            tag = group << 16 | element
            if tag > last:
                return position
            if vr in SHORT_VR:
                start = position + 8
            elif vr in LONG_VR:
                if position + 12 > size:
                    raise HeaderError("the header is cut short") if whole else NeedMoreError
                (length,) = long_of(data, position + 8)
                start = position + 12
            else:
                raise HeaderError("an element of the header has no valid value representation")
        else:
            group, element, length = implicit_of(data, position)
            tag = group << 16 | element
            if tag > last:
                return position
            vr = b""
            start = position + 8
        if length == UNDEFINED:
            position = _skip_undefined(data, start, explicit and vr != b"UN", little, whole, 0)
            continue
        position = start + length
        if position > size:
            if whole:
                raise HeaderError("the header is cut short")
            raise NeedMoreError
        if tag in wanted:
            found[tag] = bytes(data[start:position])


def _skip_undefined(
    data: bytes | memoryview, position: int, explicit: bool, little: bool, whole: bool, depth: int
) -> int:
    """Offset behind a sequence of undefined length whose first item starts at ``position`` (PS3.5 7.5)."""
    if depth > _MAX_NESTING:
        raise HeaderError("sequences are nested too deeply")
    order = "<" if little else ">"
    while True:
        if position + 8 > len(data):
            raise HeaderError("the header is cut short") if whole else NeedMoreError
        group, element, length = struct.unpack_from(order + "HHI", data, position)
        tag = group << 16 | element
        position += 8
        if tag == _SEQUENCE_END:
            return position
        if tag != _ITEM:
            raise HeaderError("a sequence holds something else than items")
        if length != UNDEFINED:
            position += length
        else:
            position = _skip_item(data, position, explicit, little, whole, depth)


def _skip_item(data: bytes | memoryview, position: int, explicit: bool, little: bool, whole: bool, depth: int) -> int:
    """Offset behind an item of undefined length."""
    order = "<" if little else ">"
    while True:
        if position + 12 > len(data) and (position + 8 > len(data) or not whole):
            raise HeaderError("the header is cut short") if whole else NeedMoreError
        group, element, length = struct.unpack_from(order + "HHI", data, position)
        if group << 16 | element == _ITEM_END:
            return position + 8
        vr = bytes(data[position + 4 : position + 6]) if explicit else b""
        if not explicit:
            position += 8
        elif vr in SHORT_VR:
            (length,) = struct.unpack_from(order + "H", data, position + 6)
            position += 8
        elif vr in LONG_VR and position + 12 <= len(data):
            (length,) = struct.unpack_from(order + "I", data, position + 8)
            position += 12
        else:
            raise HeaderError("an element inside a sequence has no valid value representation")
        if length == UNDEFINED:
            position = _skip_undefined(data, position, explicit and vr != b"UN", little, whole, depth + 1)
        else:
            position += length
