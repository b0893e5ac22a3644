"""Frames: bits, streams and the proof that a JPEG is whole."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from pydicom.uid import UID

from pipeline.reading.codecs import (
    READABLE,
    PixelError,
    SampleFormat,
    encapsulated_frame,
    jpeg as jpeg_stream,
    native_frame,
    refused_syntax,
)
from pipeline.reading.codecs.decode import clean_bits
from pipeline.reading.codecs.jpeg2000 import mend_codestream
from tests.support.dicom_files import EXPLICIT, J2K, JPEG12, JPEGLS, LOSSLESS, RLE, SV1, anatomy, compress

FORM = SampleFormat(64, 64, 16, 12, 11, False)


def image(seed: int = 0, flat_corner: bool = False) -> np.ndarray:
    stored = anatomy(1, 64, seed)[0]
    if flat_corner:
        stored[-20:] = 0
    return stored


@given(st.integers(1, 16), st.integers(0, 15), st.booleans(), st.integers(0, 2**16 - 1))
def test_bits_outside_of_the_stored_ones_never_matter(stored: int, high: int, signed: bool, raw: int) -> None:
    if high < stored - 1:
        return
    form = SampleFormat(1, 1, 16, stored, high, signed)
    assert not form.refusal()
    value = int(clean_bits(np.array([[raw]], np.uint16), form)[0, 0])
    bits = (raw >> (high + 1 - stored)) & ((1 << stored) - 1)
    expected = bits - (1 << stored) if signed and bits >> (stored - 1) else bits
    assert value == expected
    assert form.stored_range[0] <= value <= form.stored_range[1]


def test_eight_bit_pixels_in_big_endian_words() -> None:
    form = SampleFormat(1, 4, 8, 8, 7, False)
    assert native_frame(b"\2\1\4\3", form, little=False, words_of_bytes=True).tolist() == [[1, 2, 3, 4]]
    assert native_frame(b"\2\1\4\3", form, little=False, words_of_bytes=False).tolist() == [[2, 1, 4, 3]]


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("flat_corner", [False, True])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9", b"\xff\xd9\0", b"\0"])
def test_a_cut_lossless_jpeg_is_never_taken_for_whole(predictor: int, flat_corner: bool, end: bytes) -> None:
    stored = image(predictor, flat_corner)
    whole = bytes(imagecodecs.jpeg8_encode(stored, lossless=True, predictor=predictor, bitspersample=12))
    assert np.array_equal(encapsulated_frame(whole, SV1, FORM), stored)
    for cut in (1, 2, 3, 5, 17, 101, 1000):
        try:
            cells = encapsulated_frame(whole[: -2 - cut] + end, SV1, FORM)
        except PixelError:
            continue
        # The bytes that were cut off held padding or what the decoder would have filled in anyway.
        assert np.array_equal(cells, stored)


def test_the_proof_costs_no_second_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    decodes = []
    real = imagecodecs.jpeg8_decode
    monkeypatch.setattr(jpeg_stream.imagecodecs, "jpeg8_decode", lambda data: decodes.append(1) or real(data))
    for seed in range(12):
        encapsulated_frame(compress(image(seed, flat_corner=seed % 2 == 0), SV1), SV1, FORM)
    assert len(decodes) == 12


@given(st.binary(min_size=1, max_size=8), st.data())
@settings(max_examples=80, deadline=None)
def test_damaged_frames_end_in_pixel_errors_or_images(junk: bytes, data: st.DataObject) -> None:
    syntax = data.draw(st.sampled_from([RLE, SV1, JPEG12, JPEGLS, J2K]))
    stream = bytearray(compress(image(), syntax))
    at = data.draw(st.integers(0, len(stream) - 1))
    stream[at : at + len(junk)] = junk
    try:
        cells = encapsulated_frame(bytes(stream), syntax, FORM)
    except PixelError as error:
        assert error.remedy  # noqa: PT017  either outcome is fine, another exception is not
    else:
        assert cells.shape == (64, 64)


@pytest.mark.parametrize("syntax", [SV1, JPEGLS, J2K])
def test_a_stream_larger_than_its_image_is_refused_before_it_is_decoded(
    syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = compress(anatomy(1, 96)[0], syntax)
    for name in ("jpeg8_decode", "jpegls_decode", "jpeg2k_decode"):
        monkeypatch.setattr(imagecodecs, name, lambda *a, **k: pytest.fail("decoded"))
    with pytest.raises(PixelError, match="96 x 96 where 64 x 64"):
        encapsulated_frame(stream, syntax, FORM)


def test_a_codestream_in_order_is_left_alone() -> None:
    stream = compress(image(), J2K)
    assert mend_codestream(stream) == stream
    assert mend_codestream(stream + b"\0") == stream + b"\0"


@pytest.mark.parametrize("missing", [0, 2])
@pytest.mark.parametrize("error", [-3, 1, 900])
def test_a_wrong_tile_length_is_mended(missing: int, error: int) -> None:
    stored = image()
    stream = compress(stored, J2K)
    at = stream.find(b"\xff\x90") + 6
    length = int.from_bytes(stream[at : at + 4], "big") + error
    wrong = stream[:at] + length.to_bytes(4, "big") + stream[at + 4 :]
    wrong = wrong[: len(wrong) - missing]
    assert np.array_equal(encapsulated_frame(wrong, J2K, FORM), stored)


@pytest.mark.parametrize("ending", [b"", b"\xff\xd9", b"\xff\xd9" + bytes(20)])
def test_a_codestream_is_refused_wherever_it_is_cut(ending: bytes) -> None:
    stored = image()
    stream = compress(stored, J2K).removesuffix(b"\xff\xd9")
    for length in range(stream.find(b"\xff\x90"), len(stream)):
        with pytest.raises(PixelError):
            encapsulated_frame(stream[:length] + ending, J2K, FORM)
    assert np.array_equal(encapsulated_frame(stream + ending, J2K, FORM), stored)


@pytest.mark.parametrize("layers", [1, 3])
def test_a_tiled_codestream_is_refused_wherever_it_is_cut(layers: int) -> None:
    file = io.BytesIO()
    rates = {"quality_mode": "rates", "quality_layers": [20, 5, 1][-layers:]}
    Image.fromarray(image()).save(file, "JPEG2000", no_jp2=True, irreversible=False, tile_size=(32, 32), **rates)
    stream = file.getvalue().removesuffix(b"\xff\xd9")
    whole = imagecodecs.jpeg2k_decode(stream + b"\xff\xd9")
    for ending in (b"", b"\xff\xd9"):
        assert np.array_equal(encapsulated_frame(stream + ending, J2K, FORM), whole)
        for length in range(stream.find(b"\xff\x90"), len(stream), 3):
            with pytest.raises(PixelError):
                encapsulated_frame(stream[:length] + ending, J2K, FORM)


@pytest.mark.parametrize("length", range(120))
def test_a_codestream_that_ends_within_its_headers_is_refused(length: int) -> None:
    stream = compress(image(), J2K)
    assert stream.find(b"\xff\x90") < 120
    with pytest.raises(PixelError):
        encapsulated_frame(stream[:length], J2K, FORM)


def test_every_syntax_is_read_or_refused_by_name() -> None:
    assert set(LOSSLESS) <= set(READABLE)
    assert refused_syntax(EXPLICIT) == ""
    assert "JPEG XL" in refused_syntax("1.2.840.10008.1.2.4.110")
    assert "1.2.840.10008.1.2.4.104" in refused_syntax("1.2.840.10008.1.2.4.104")
    assert all(UID(uid).is_transfer_syntax for uid in READABLE)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((0, 4, 16, 12, 11, False), "0 x 4"),
        ((4, 60000, 16, 12, 11, False), "60000"),
        ((4, 4, 32, 32, 31, False), "32 bits"),
        ((4, 4, 16, 17, 16, False), "contradict"),
        ((4, 4, 16, 12, 5, False), "contradict"),
        ((4, 4, 16, 12, 16, False), "high bit 16"),
    ],
)
def test_impossible_forms(values: tuple[int, int, int, int, int, bool], word: str) -> None:
    assert word in SampleFormat(*values).refusal()
