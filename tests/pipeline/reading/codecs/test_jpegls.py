"""JPEG-LS streams: whole ones decode whatever is padded behind them, cut ones never reach the decoder."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, strategies as st

from pipeline.reading.codecs import PixelError, SampleFormat, encapsulated_frame
from pipeline.reading.codecs.jpegls import parse_jpegls
from tests.support.dicom_files import JPEGLS, anatomy

STORED = anatomy(1, 32)[0]
STREAM = bytes(imagecodecs.jpegls_encode(STORED))
FORM = SampleFormat(32, 32, 16, 12, 11, False)


@given(padding=st.integers(0, 600), filled=st.sampled_from([b"\0", b"\xff", b"\xff\xd9", b"\x17"]))
def test_whatever_follows_the_end_marker_is_padding(padding: int, filled: bytes) -> None:
    cells = encapsulated_frame(STREAM + filled * padding, JPEGLS, FORM)
    np.testing.assert_array_equal(cells, STORED)


@given(kept=st.integers(0, len(STREAM) - 1), padding=st.integers(0, 4))
def test_a_cut_stream_never_reaches_the_decoder(kept: int, padding: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagecodecs, "jpegls_decode", lambda data: pytest.fail("decoded a cut stream"))
        with pytest.raises(PixelError):
            encapsulated_frame(STREAM[:kept] + b"\0" * padding, JPEGLS, FORM)


def test_coded_bits_cut_before_the_end_marker_are_refused_by_the_decoder() -> None:
    with pytest.raises(PixelError, match="refuses"):
        encapsulated_frame(STREAM[: len(STREAM) // 2] + b"\xff\xd9", JPEGLS, FORM)


def test_fill_bytes_before_markers_are_skipped() -> None:
    filled = STREAM.replace(b"\xff\xf7", b"\xff\xff\xff\xf7", 1)
    frame = parse_jpegls(filled)
    assert (frame.rows, frame.columns, frame.whole) == (32, 32, filled)


@pytest.mark.parametrize(
    ("found", "replaced", "word"),
    [
        (b"\xff\xd8", b"\xff\xd9", "start marker"),
        (b"\xff\xf7\x00\x0b", b"\xff\xf7\x00\x0e", "one component"),
        (b"\xff\xf7\x00\x0b", b"\xff\xf7\xff\xff", "cut short"),
        (b"\xff\xf7\x00\x0b", b"\xff\xf8\x00\x0b", "no JPEG-LS frame header"),
        (b"\xff\xd9", b"\xff\xda", "damaged JPEG-LS data"),
    ],
)
def test_damaged_markers_are_named(found: bytes, replaced: bytes, word: str) -> None:
    head, _, tail = STREAM.partition(found) if found != b"\xff\xd9" else STREAM.rpartition(found)
    with pytest.raises(ValueError, match=word):
        parse_jpegls(head + replaced + tail)


def test_two_components_are_refused() -> None:
    at = STREAM.index(b"\xff\xf7")
    body = bytearray(STREAM[at + 4 : at + 13])
    body[5] = 2
    two = STREAM[:at] + b"\xff\xf7" + struct.pack(">H", 14) + bytes(body) + b"\x02\x11\x00" + STREAM[at + 13 :]
    with pytest.raises(ValueError, match="one component"):
        parse_jpegls(two)
