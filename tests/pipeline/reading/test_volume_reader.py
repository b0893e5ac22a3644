"""Pixels to HU: the same numbers as pydicom's own decoding, in every lossless syntax; damage is refused."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.pixels import apply_rescale

from latentcache import InputError
from pipeline.archive import open_archive
from pipeline.reading import pointer_of, read_scanned, read_series, scan
from pipeline.reading.codecs import PixelError
from pipeline.reading.pixels import read_slice
from pipeline.volume import SeriesPointer, Volume
from tests.support.dicom_files import (
    BIG,
    DEFLATED,
    EXPLICIT,
    HTJ2K,
    IMPLICIT,
    J2K,
    JPEG8,
    JPEG12,
    JPEGLS,
    JPEGLS_NEAR,
    LOSSLESS,
    RLE,
    SV1,
    anatomy,
    dataset,
    file_bytes,
    series_files,
    zip_of,
)


def read_all(path: Path, threads: int = 1) -> list[Volume]:
    found = scan(open_archive(path))
    return [read_series(pointer_of(one), threads=threads) for one in found.series if one.status == "ok"]


def read_one(path: Path) -> Volume:
    (volume,) = read_all(path)
    return volume


def pydicom_hu(files: list[bytes]) -> np.ndarray:
    """HU by pydicom alone, sorted by position."""
    slices = sorted((dcmread(io.BytesIO(f)) for f in files), key=lambda d: float(d.ImagePositionPatient[2]))
    return np.stack([apply_rescale(d.pixel_array, d) for d in slices])


@pytest.mark.parametrize("syntax", LOSSLESS)
@pytest.mark.parametrize("form", ["u12", "s12", "s16", "u16"])
def test_same_hu_as_pydicom(tmp_path: Path, syntax: str, form: str) -> None:
    base = anatomy(5, 24)
    bits = int(form[1:])
    stored = base if form[0] == "u" else base.astype(np.int16) - 1024
    intercept = -1024 if form[0] == "u" else 0

    def tweak(ds: object, index: int) -> None:
        ds.RescaleIntercept = intercept  # type: ignore[attr-defined]

    files = series_files(stored, syntax=syntax, tweak=tweak, bits=bits)
    volume = read_one(zip_of(tmp_path / "a.zip", files))
    assert volume.hu.dtype == np.int16
    expected = base.astype(np.int16) - 1024
    assert np.array_equal(volume.hu, expected)
    assert np.array_equal(volume.hu, pydicom_hu(files))


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG, RLE, JPEGLS, J2K, SV1])
def test_eight_bit(tmp_path: Path, syntax: str) -> None:
    stored = (anatomy(4, 16) // 16).astype(np.uint8)
    volume = read_one(zip_of(tmp_path / "a.zip", series_files(stored, syntax=syntax, bits=8)))
    assert np.array_equal(volume.hu, stored.astype(np.int16) - 1024)


@pytest.mark.parametrize(("syntax", "error"), [(JPEG12, 40), (JPEG8, 8), (JPEGLS_NEAR, 2)])
def test_lossy_is_close_and_flagged(tmp_path: Path, syntax: str, error: int) -> None:
    stored = anatomy(4, 32)
    if syntax == JPEG8:
        stored = (stored // 16).astype(np.uint8)
    files = series_files(stored, syntax=syntax, bits=8 if syntax == JPEG8 else 12)
    (one,) = scan(open_archive(zip_of(tmp_path / "a.zip", files))).series
    assert "lossy-compressed" in one.flags
    volume = read_series(pointer_of(one))
    assert np.abs(volume.hu - (stored.astype(np.int16) - 1024)).max() <= error


def test_threads_and_kept_headers_change_nothing(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", series_files(anatomy(9, 32), syntax=DEFLATED))
    source = open_archive(path)
    (one,) = scan(source, keep_instances=True).series
    volumes = [read_series(pointer_of(one), threads=3), read_scanned(source, one, threads=2), read_scanned(source, one)]
    for volume in volumes:
        assert np.array_equal(volume.hu, anatomy(9, 32).astype(np.int16) - 1024)
        assert volume.geometry == one.geometry
        assert volume.header.sop_instance_uids == one.header.sop_instance_uids


def test_slices_are_ordered_by_position_not_by_number_or_name(tmp_path: Path) -> None:
    stored = anatomy(6, 16)
    z = [25.0, 0.0, 10.0, 5.0, 20.0, 15.0]
    volume = read_one(zip_of(tmp_path / "a.zip", series_files(stored, z=z)))
    assert np.array_equal(volume.hu, stored[np.argsort(z)].astype(np.int16) - 1024)
    assert volume.geometry.z_mm == (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)


def test_feet_first_normal_still_ascends(tmp_path: Path) -> None:
    def upside_down(ds: object, index: int) -> None:
        ds.ImageOrientationPatient = [1, 0, 0, 0, -1, 0]  # type: ignore[attr-defined]

    volume = read_one(zip_of(tmp_path / "a.zip", series_files(anatomy(5, 16), tweak=upside_down)))
    assert np.all(np.diff(volume.geometry.z_mm) > 0)
    assert volume.geometry.slice_position(0)[2] == pytest.approx(20.0)
    assert np.array_equal(volume.hu, anatomy(5, 16)[::-1].astype(np.int16) - 1024)


def test_rescale_applies_per_slice(tmp_path: Path) -> None:
    def mixed(ds: object, index: int) -> None:
        ds.RescaleIntercept = -1024 - index  # type: ignore[attr-defined]

    volume = read_one(zip_of(tmp_path / "a.zip", series_files(anatomy(5, 16), tweak=mixed)))
    expected = anatomy(5, 16).astype(np.int16) - 1024 - np.arange(5, dtype=np.int16)[:, None, None]
    assert np.array_equal(volume.hu, expected)
    assert "mixed-rescale" in volume.flags


def test_fractional_slope_gives_float32_as_pydicom(tmp_path: Path) -> None:
    def fractional(ds: object, index: int) -> None:
        ds.RescaleSlope = "0.62"  # type: ignore[attr-defined]

    files = series_files(anatomy(4, 16), tweak=fractional)
    volume = read_one(zip_of(tmp_path / "a.zip", files))
    assert volume.hu.dtype == np.float32
    assert np.array_equal(volume.hu, pydicom_hu(files).astype(np.float32))


@pytest.mark.parametrize("tagged", [True, False])
def test_padding_outside_the_field_of_view_becomes_air(tmp_path: Path, tagged: bool) -> None:
    stored = anatomy(4, 16).astype(np.int16)
    stored[:, :3] = -2000

    def padding(ds: object, index: int) -> None:
        if tagged:
            ds.add_new(0x00280120, "SS", -2000)  # type: ignore[attr-defined]

    volume = read_one(zip_of(tmp_path / "a.zip", series_files(stored, bits=16, tweak=padding)))
    assert volume.hu.min() >= -1024
    assert np.all(volume.hu[:, :3] == -1024)
    assert ("padding" if tagged else "padding-untagged") in volume.flags


def test_a_padding_value_that_is_tissue_is_left_alone(tmp_path: Path) -> None:
    def padding(ds: object, index: int) -> None:
        ds.add_new(0x00280120, "US", 1060)  # type: ignore[attr-defined]

    volume = read_one(zip_of(tmp_path / "a.zip", series_files(anatomy(4, 32), tweak=padding)))
    assert np.array_equal(volume.hu, anatomy(4, 32).astype(np.int16) - 1024)
    assert "padding-ignored" in volume.flags


def test_overlay_bits_are_masked_and_signs_extended(tmp_path: Path) -> None:
    stored = anatomy(4, 16)
    dirty = stored | np.uint16(0xA000)
    volume = read_one(zip_of(tmp_path / "a.zip", series_files(dirty)))
    assert np.array_equal(volume.hu, stored.astype(np.int16) - 1024)
    signed = stored.astype(np.int16) - 1500
    cut = (signed & 0x0FFF).astype(np.int16)

    def unshifted(ds: object, index: int) -> None:
        ds.RescaleIntercept = 0  # type: ignore[attr-defined]

    volume = read_one(zip_of(tmp_path / "b.zip", series_files(cut, tweak=unshifted)))
    assert np.array_equal(volume.hu, signed)


def test_values_above_int16_saturate_with_a_flag(tmp_path: Path) -> None:
    stored = anatomy(4, 16)
    stored[:, 8, 8] = 60000
    volume = read_one(zip_of(tmp_path / "a.zip", series_files(stored, bits=16)))
    assert volume.hu[0, 8, 8] == 32767
    assert "saturated" in volume.flags


# CharLS needs seconds of CPU to throw on some machines, so one cut is enough for JPEG-LS.
@pytest.mark.parametrize(
    ("syntax", "keep"),
    [(s, k) for s in (EXPLICIT, RLE, SV1, JPEG12, J2K, HTJ2K) for k in (0.3, 0.9, 0.995)] + [(JPEGLS, 0.9)],
)
def test_truncated_pixel_data_are_refused(tmp_path: Path, syntax: str, keep: float) -> None:
    stored = anatomy(4, 64)
    files = series_files(stored, syntax=syntax)
    ds = dcmread(io.BytesIO(files[1]))
    raw = ds.PixelData
    if syntax == EXPLICIT:
        ds.PixelData = raw[: int(len(raw) * keep) // 2 * 2]
    else:
        from pydicom.encaps import encapsulate, generate_frames

        (frame,) = generate_frames(raw, number_of_frames=1)
        frame = frame.rstrip(b"\0")
        ds.PixelData = encapsulate([frame[: int(len(frame) * keep)]])
    files[1] = file_bytes(ds, None, syntax)
    (one,) = scan(open_archive(zip_of(tmp_path / "a.zip", files))).series
    if one.status == "ok":
        with pytest.raises(InputError, match=r"cut short|refuses|too long|out of order|segments"):
            read_series(pointer_of(one))
    else:
        assert "cut short" in one.reason


def test_pixel_data_longer_than_the_image_are_refused(tmp_path: Path) -> None:
    files = series_files(anatomy(4, 16))
    ds = dcmread(io.BytesIO(files[2]))
    ds.PixelData = ds.PixelData + b"\0" * 64
    files[2] = file_bytes(ds, None)
    (one,) = scan(open_archive(zip_of(tmp_path / "a.zip", files))).series
    with pytest.raises(InputError, match="longer than the image"):
        read_series(pointer_of(one))


def test_a_codestream_whose_length_overshoots_is_decoded_when_whole(tmp_path: Path) -> None:
    from pydicom.encaps import encapsulate, generate_frames

    stored = anatomy(4, 64)
    files = series_files(stored, syntax=J2K)
    for index, data in enumerate(files):
        ds = dcmread(io.BytesIO(data))
        (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
        at = frame.find(b"\xff\x90") + 6
        length = int.from_bytes(frame[at : at + 4], "big") + 17
        ds.PixelData = encapsulate([frame[:at] + length.to_bytes(4, "big") + frame[at + 4 :]])
        files[index] = file_bytes(ds, None, J2K)
    volume = read_one(zip_of(tmp_path / "a.zip", files))
    assert np.array_equal(volume.hu, stored.astype(np.int16) - 1024)


def test_flipped_bit_in_the_zip_is_noticed(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", series_files(anatomy(4, 64)), zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x10
    path.write_bytes(raw)
    (one,) = scan(open_archive(path)).series
    with pytest.raises(InputError, match="checksum"):
        read_series(pointer_of(one))


def test_an_archive_that_changed_is_not_read_as_before(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "a.zip", series_files())
    (one,) = scan(open_archive(path)).series
    zip_of(path, series_files(z=[40.0 - 5 * k for k in range(8)]))
    with pytest.raises(InputError, match="another order"):
        read_series(pointer_of(one))
    zip_of(path, series_files()[:5])
    with pytest.raises(InputError, match="no longer"):
        read_series(pointer_of(one))
    with pytest.raises(InputError):
        read_series(SeriesPointer("", ()))


def test_errors_name_no_file_and_nobody(tmp_path: Path) -> None:
    folder = tmp_path / "DOE_JOHN"
    folder.mkdir()
    files = series_files(anatomy(4, 64))
    files[0] = files[0][:-3000]
    path = zip_of(folder / "DOE_JOHN.zip", {f"DOE/{i}": f for i, f in enumerate(files)})
    (one,) = scan(open_archive(path)).series
    assert "DOE" not in one.reason
    with pytest.raises(InputError) as caught:
        read_series(pointer_of(one))
    assert "DOE" not in str(caught.value)
    assert "4711" not in str(caught.value)


def test_file_without_preamble_and_meta(tmp_path: Path) -> None:
    stored = anatomy(4, 16)
    files = [
        file_bytes(dataset(s, position=(0, 0, 5.0 * k), number=k), s, syntax, preamble=False)
        for k, (s, syntax) in enumerate(zip(stored, [IMPLICIT, EXPLICIT, IMPLICIT, EXPLICIT], strict=True))
    ]
    volume = read_one(zip_of(tmp_path / "a.zip", files))
    assert np.array_equal(volume.hu, stored.astype(np.int16) - 1024)
    assert "no-file-meta" in volume.flags


@pytest.mark.real
@pytest.mark.parametrize("name", ["ape-layout/non-APE/head-phantom.zip", "odd/overlapping-3mm-every-2mm-jpeg2000.zip"])
def test_real_series_equal_pydicom(real_data: Path, name: str) -> None:
    path = real_data / name
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        for one in scan(open_archive(path)).series:
            picked = one.pointer_members[::16]
            volume = read_series(pointer_of(one))
            for _, index, _ in picked:
                ds = dcmread(io.BytesIO(archive.read(members[index])))
                k = one.pointer_members.index((str(path), index, 0))
                assert np.array_equal(volume.hu[k], apply_rescale(ds.pixel_array, ds))
                assert volume.geometry.slice_position(k) == pytest.approx(tuple(ds.ImagePositionPatient), abs=1e-3)


@pytest.mark.parametrize("syntax", [EXPLICIT, SV1, JPEGLS])
@pytest.mark.parametrize(("stored", "high"), [(0, 11), (20, 11), (12, 3), (12, 30)])
def test_a_frame_of_impossible_form_is_refused(tmp_path: Path, syntax: str, stored: int, high: int) -> None:
    """Found by fuzzing: the bits cleared above the stored ones were taken from the header unseen."""
    files = series_files(anatomy(3, 16), syntax=syntax)
    broken = []
    for data in files:
        ds = dcmread(io.BytesIO(data))
        ds.BitsStored, ds.HighBit = stored, high
        out = io.BytesIO()
        ds.save_as(out)
        broken.append(out.getvalue())
    source = open_archive(zip_of(tmp_path / "a.zip", broken))
    (one,) = scan(source, keep_instances=True).series
    assert one.status == "quarantined"
    with pytest.raises(PixelError):
        read_slice(source, one.instances[0])


@pytest.mark.parametrize("syntax", [EXPLICIT, SV1, RLE])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_memory_used_again_never_mixes_slices(tmp_path: Path, syntax: str, method: int) -> None:
    """Series of growing size read in turn, members of unlike lengths, more threads than cores."""
    for size in (16, 64, 24):
        stored = anatomy(9, size, seed=size)
        path = zip_of(tmp_path / f"{size}.zip", series_files(stored, syntax=syntax), method)
        np.testing.assert_array_equal(read_all(path, threads=4)[0].hu, stored.astype(np.int16) - 1024)


def test_one_broken_slice_stops_all_threads(tmp_path: Path) -> None:
    files = series_files(anatomy(40, 16), syntax=SV1)
    files[20] = files[20][:-60] + bytes(60)
    with pytest.raises(InputError):
        read_all(zip_of(tmp_path / "a.zip", files), threads=3)
