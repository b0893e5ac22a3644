"""Odd archives, each with what a reader should make of it: the volumes inside, or a refusal with a reason.

Used twice: `test_odd_inputs.py` holds ctpipe to it, `infra/bench/odd_inputs.py` shows what other readers do.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.encaps import encapsulate, generate_frames

from tests.support.dicom_files import (
    BIG,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    J2K,
    SV1,
    anatomy,
    dataset,
    enhanced,
    file_bytes,
    series_files,
    zip_of,
)

SIZE, COUNT = 48, 8
Volume = NDArray[Any]


@dataclass(frozen=True)
class OddCase:
    """``volumes``: HU of every volume that a reader may return; none means that nothing may come back silently.

    ``why`` is what ctpipe's reason, flag or problem must contain; ``spacing_mm`` is measured along the normal (mean).
    """

    name: str
    make: Callable[[Path], Path]
    volumes: tuple[Volume, ...]
    why: str = ""
    spacing_mm: float = 5.0


CASES: list[OddCase] = []


def base(seed: int = 0, count: int = COUNT) -> NDArray[np.uint16]:
    return anatomy(count, SIZE, seed)


def hu(stored: NDArray[Any], offset: int = -1024) -> Volume:
    return (stored.astype(np.int32) + offset).astype(np.int16)


PLAIN = hu(base())


def case(name: str, *volumes: Volume, why: str = "") -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def register(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES.append(OddCase(name, make, volumes, why))
        return make

    return register


def simple(
    name: str,
    files: Callable[[], list[bytes] | dict[str, bytes]],
    *volumes: Volume,
    why: str = "",
    spacing_mm: float = 5.0,
) -> None:
    CASES.append(OddCase(name, lambda path: zip_of(path, files()), volumes, why, spacing_mm))


def tweaked(change: Callable[[Dataset, int], None], stored: NDArray[Any] | None = None, **header: Any) -> list[bytes]:
    return series_files(base() if stored is None else stored, tweak=change, **header)


def put(**values: Any) -> Callable[[Dataset, int], None]:
    """A tweak that sets attributes on every slice."""

    def change(ds: Dataset, index: int) -> None:
        for keyword, value in values.items():
            setattr(ds, keyword, value)

    return change


def on(which: int, change: Callable[[Dataset], Any]) -> Callable[[Dataset, int], None]:
    """A tweak of one slice only."""

    def only(ds: Dataset, index: int) -> None:
        if index == which:
            change(ds)

    return only


def edited(data: bytes, change: Callable[[Dataset], Any], syntax: str = EXPLICIT) -> bytes:
    ds = dcmread(io.BytesIO(data))
    change(ds)
    return file_bytes(ds, None, syntax)


def other(**values: Any) -> bytes:
    """A lone image that belongs to no volume."""
    stored = base(9, 1)[0]
    ds = dataset(stored, series="1.2.826.0.1.3680043.8.498.77", position=(0, 0, 0), number=99)
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return file_bytes(ds, stored)


def cut_jpeg(end: bytes) -> list[bytes]:
    files = series_files(base(), syntax=SV1)

    def change(ds: Dataset) -> None:
        (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
        ds.PixelData = encapsulate([frame[: len(frame) * 2 // 3] + end])

    files[3] = edited(files[3], change, SV1)
    return files


def overshooting() -> list[bytes]:
    files = []
    for data in series_files(base(), syntax=J2K):
        ds = dcmread(io.BytesIO(data))
        (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
        at = frame.find(b"\xff\x90") + 6
        longer = (int.from_bytes(frame[at : at + 4], "big") + 9).to_bytes(4, "big")
        ds.PixelData = encapsulate([frame[:at] + longer + frame[at + 4 :]])
        files.append(file_bytes(ds, None, J2K))
    return files


def scanned_back() -> list[bytes]:
    return tweaked(lambda ds, i: setattr(ds, "InstanceNumber", [5, 2, 8, 1, 7, 3, 6, 4][i]))


def drop_position(ds: Dataset) -> None:
    del ds.ImagePositionPatient


def tilt(ds: Dataset, index: int) -> None:
    angle = np.deg2rad(20)
    ds.ImageOrientationPatient = [1, 0, 0, 0, float(np.cos(angle)), float(-np.sin(angle))]
    ds.GantryDetectorTilt = 20


def shuffled() -> list[bytes]:
    order = [3, 0, 6, 1, 7, 2, 5, 4]
    return [enhanced(base()[order], [5.0 * k for k in order])]


def padded() -> list[bytes]:
    stored = base().astype(np.int16)
    stored[:, :4] = -2000
    return series_files(stored, bits=16, tweak=lambda ds, i: ds.add_new(0x00280120, "SS", -2000))


def padded_hu() -> Volume:
    truth = PLAIN.copy()
    truth[:, :4] = -1024
    return truth


def phases(**told: Callable[[int], Any]) -> list[bytes]:
    files = []
    for phase in range(2):
        values = {keyword: value(phase) for keyword, value in told.items()}
        files += tweaked(put(**values, InstanceNumber=phase), base(phase))
    return files


def half_a_step_apart(**told: Callable[[int], Any]) -> list[bytes]:
    """Two volumes under one series UID whose slices alternate so evenly that they look like one."""
    files = []
    for phase in range(2):
        values = put(**{keyword: value(phase) for keyword, value in told.items()})
        files += series_files(base(phase), z=[5.0 * k + 2.5 * phase for k in range(COUNT)], tweak=values)
    return files


def wide_jpeg_2000(intercept: int, odd: int) -> list[bytes]:
    """Signed codestreams of 16 bits where 12 are declared, with one value in the corners that takes all of them."""
    files = []
    for index, stored in enumerate(base().astype(np.int16)):
        stored[:4, :4] = odd
        ds = dataset(stored, position=(-10.0, -20.0, 5.0 * index), number=index + 1)
        ds.RescaleIntercept = intercept
        cells = imagecodecs.jpeg2k_encode(stored, level=0, reversible=True, codecformat="j2k", bitspersample=16)
        ds.PixelData = encapsulate([bytes(cells)])
        ds["PixelData"].VR = "OB"
        files.append(file_bytes(ds, None, J2K))
    return files


def wide_hu(offset: int, corner: int) -> Volume:
    truth = hu(base(), offset)
    truth[:, :4, :4] = corner
    return truth


def after_meta(data: bytes, extra: bytes) -> bytes:
    """A file with bytes put behind its file meta information, whose length (0002,0000) covers them."""
    length = int.from_bytes(data[140:144], "little")
    end = 144 + length
    return data[:140] + (length + len(extra)).to_bytes(4, "little") + data[144:end] + extra + data[end:]


def nested(depth: int) -> bytes:
    """Sequences of undefined length, one inside the other (PS3.5 7.5.2), in (0008,1140), explicit VR little endian."""
    opened = b"\x08\x00\x40\x11SQ\x00\x00\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closed = b"\xfe\xff\x0d\xe0\x00\x00\x00\x00\xfe\xff\xdd\xe0\x00\x00\x00\x00"
    return opened * depth + closed * depth


def before_tag(data: bytes, tag: bytes, extra: bytes) -> bytes:
    at = data.index(tag, 144)
    return data[:at] + extra + data[at:]


def disguised_dicomdir() -> bytes:
    """A DICOMDIR whose records point out of the folder, at what must never be opened."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = "1.2.840.10008.1.3.10", "1.2.3.4.5"
    ds.FileSetID = "DISC"
    record = Dataset()
    record.DirectoryRecordType = "IMAGE"
    record.ReferencedFileID = ["UP", "UP", "UP", "ETC", "PASSWD"]
    ds.DirectoryRecordSequence = [record]
    return file_bytes(ds, None).replace(b"UP\\", b"..\\")


simple("nothing odd", lambda: series_files(base()), PLAIN)
simple("InstanceNumber is not spatial", scanned_back, PLAIN)
simple(
    "file names in reverse",
    lambda: {f"2/{9 - i}": f for i, f in enumerate(series_files(base()))},
    PLAIN,
)
simple("a slice is missing", lambda: [f for i, f in enumerate(series_files(base())) if i != 3], why="missing")
simple(
    "the same file twice",
    lambda: [*series_files(base()), series_files(base())[2]],
    PLAIN,
    why="duplicates-dropped",
)
simple(
    "two images at one position",
    lambda: [*series_files(base()), tweaked(put(SOPInstanceUID="1.2.3.9"), base(1))[2]],
    why="different images",
)
simple(
    "a localizer under the series' UID",
    lambda: [
        *series_files(base()),
        other(
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            SeriesInstanceUID="1.2.826.0.1.3680043.8.498.2",
            ImageOrientationPatient=[0, 1, 0, 0, 0, -1],
        ),
    ],
    PLAIN,
    why="localizer",
)
simple(
    "two series in one folder",
    lambda: [*series_files(base()), *series_files(base(1), series="1.2.826.0.1.3680043.8.498.5")],
    PLAIN,
    hu(base(1)),
)
simple(
    "two studies in one zip",
    lambda: [
        *series_files(base()),
        *series_files(base(1), series="1.2.826.0.1.3680043.8.498.5", study="1.2.826.0.1.3680043.8.498.6"),
    ],
    PLAIN,
    hu(base(1)),
)
simple(
    "two acquisitions under one series UID",
    lambda: phases(AcquisitionNumber=lambda p: p + 1),
    PLAIN,
    hu(base(1)),
    why="split",
)
simple(
    "two kernels under one series UID",
    lambda: phases(ConvolutionKernel=lambda p: ("Br38f", "Br59f")[p]),
    PLAIN,
    hu(base(1)),
    why="split",
)
simple(
    "two energies under one series UID",
    lambda: phases(KVP=lambda p: (80, 140)[p]),
    PLAIN,
    hu(base(1)),
    why="split",
)
simple(
    "two cardiac phases under one series UID, half a step apart",
    lambda: half_a_step_apart(NominalPercentageOfCardiacPhase=lambda p: (30.0, 75.0)[p]),
    PLAIN,
    hu(base(1)),
    why="split",
)
simple(
    "four cardiac phases at the same positions, the first at 0%",
    lambda: [f for p in range(4) for f in tweaked(put(NominalPercentageOfCardiacPhase=25.0 * p), base(p))],
    *(hu(base(p)) for p in range(4)),
    why="split",
)
simple(
    "two series numbers under one series UID, half a step apart",
    lambda: half_a_step_apart(SeriesNumber=lambda p: p + 2),
    PLAIN,
    hu(base(1)),
    why="split",
)
simple(
    "two image types under one series UID, half a step apart",
    lambda: half_a_step_apart(ImageType=lambda p: ["ORIGINAL", "PRIMARY", "AXIAL", ("FBP", "ADMIRE")[p]]),
    PLAIN,
    hu(base(1)),
    why="split",
)
simple(
    "a frame of reference for every slice",
    lambda: tweaked(lambda ds, i: setattr(ds, "FrameOfReferenceUID", f"1.2.3.{i}")),
    PLAIN,
    why="frame-of-reference-per-slice",
)
simple("two phases that nothing tells apart", lambda: phases(), why="different images")
simple("gantry tilt of 20 degrees", lambda: tweaked(tilt), PLAIN, why="gantry-tilt", spacing_mm=4.698)
simple("one position missing", lambda: tweaked(on(3, drop_position)), why="missing")
simple(
    "a position that is NaN",
    lambda: [f.replace(b"-10.0\\-20.0\\15.0", b"-10.0\\-20.0\\NaN ", 1) for f in series_files(base())],
    why="no number",
)
simple(
    "slices that shift in plane",
    lambda: tweaked(on(4, lambda ds: setattr(ds, "ImagePositionPatient", [3.0, -20, 20]))),
    why="shift in plane",
)
simple(
    "variable spacing",
    lambda: series_files(base(), z=[0, 5, 10, 15, 18, 21, 24, 27]),
    PLAIN,
    why="variable-spacing",
    spacing_mm=27 / 7,
)
simple(
    "positions rounded to 0.1 mm",
    lambda: series_files(base(), z=[0, 0.6, 1.2, 1.9, 2.5, 3.1, 3.8, 4.4]),
    PLAIN,
    spacing_mm=4.4 / 7,
)
simple(
    "raw pixels cut short",
    lambda: [
        f if i != 3 else edited(f, lambda ds: setattr(ds, "PixelData", ds.PixelData[:3000]))
        for i, f in enumerate(series_files(base()))
    ],
    why="cut short",
)
simple("JPEG lossless cut short", lambda: cut_jpeg(b""), why="cut short")
simple("JPEG lossless cut short, end marker put back", lambda: cut_jpeg(b"\xff\xd9"), why="cut short")
simple(
    "pixel data longer than the image",
    lambda: [edited(f, lambda ds: setattr(ds, "PixelData", ds.PixelData + bytes(999))) for f in series_files(base())],
    why="longer",
)
simple("JPEG 2000 whose length overshoots", overshooting, PLAIN)
simple("enhanced multi-frame, shuffled", shuffled, PLAIN)
simple("padding of -2000 outside the field of view", padded, padded_hu(), why="padding")
simple("overlay in the high bits", lambda: series_files(base() | np.uint16(0xC000)), PLAIN)
simple(
    "signed 12 bits without sign extension",
    lambda: tweaked(put(RescaleIntercept=0), ((base().astype(np.int16) - 1024) & 0xFFF).astype(np.int16)),
    PLAIN,
)
simple(
    "another rescale in every slice",
    lambda: tweaked(lambda ds, i: setattr(ds, "RescaleIntercept", -1024 - 10 * i)),
    (PLAIN - 10 * np.arange(COUNT, dtype=np.int16)[:, None, None]).astype(np.int16),
    why="mixed-rescale",
)
simple(
    "a fractional slope",
    lambda: tweaked(put(RescaleSlope="0.5")),
    (base() * 0.5 - 1024).astype(np.float32),
)
simple(
    "two in-plane sizes under one series UID",
    lambda: [*series_files(base()), *series_files(anatomy(COUNT, 32, 1))],
    PLAIN,
    hu(anatomy(COUNT, 32, 1)),
    why="split",
)
simple(
    "RescaleSlope and RescaleIntercept missing",
    lambda: tweaked(lambda ds, i: [ds.pop("RescaleSlope"), ds.pop("RescaleIntercept")]),
    why="HU are unknown",
)
simple("explicit VR big endian", lambda: series_files(base(), syntax=BIG), PLAIN)
simple("deflated transfer syntax", lambda: series_files(base(), syntax=DEFLATED), PLAIN)
simple(
    "no preamble, no meta information",
    lambda: [
        file_bytes(dataset(s, position=(-10, -20, 5.0 * k), number=k + 1), s, IMPLICIT, preamble=False)
        for k, s in enumerate(base())
    ],
    PLAIN,
)
simple(
    "all UIDs emptied by anonymisation",
    lambda: tweaked(put(StudyInstanceUID="", SeriesInstanceUID="")),
    PLAIN,
    why="surrogate-uid",
)
simple(
    "captures, a report, a viewer and a DICOMDIR beside",
    lambda: {
        **{f"S2/I{i}": f for i, f in enumerate(series_files(base()))},
        "S9/I1": other(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="OT"),
        "S9/I2": other(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67", Modality="SR"),
        "AUTORUN.INF": b"[autorun]\r\nopen=viewer.exe\r\n",
        "viewer.exe": b"MZ" + bytes(4000),
        "empty": b"",
        "README": b"This disc holds images." * 20,
    },
    PLAIN,
    why="secondary capture",
)
simple(
    "a coronal reformat",
    lambda: tweaked(put(ImageType=["DERIVED", "SECONDARY", "MPR"], ImageOrientationPatient=[1, 0, 0, 0, 0, -1])),
    why="coronal",
)
simple(
    "a maximum intensity projection", lambda: tweaked(put(ImageType=["DERIVED", "SECONDARY", "MIP"])), why="projection"
)
simple(
    "an axial multi-planar reconstruction",
    lambda: tweaked(put(ImageType=["DERIVED", "SECONDARY", "MPR"])),
    PLAIN,
    why="derived",
)
simple("a map that is not in HU", lambda: tweaked(put(RescaleType="Z_EFF")), why="not in Hounsfield")
simple("a rescale type that spells Hounsfield out", lambda: tweaked(put(RescaleType="Hounsfield")), PLAIN)
simple("a negative slope", lambda: tweaked(put(RescaleSlope=-1)), why="below zero")
simple("palette colour", lambda: tweaked(put(PhotometricInterpretation="PALETTE COLOR")), why="no grey levels")
simple("a negative slice thickness", lambda: tweaked(put(SliceThickness=-5)), PLAIN, why="negative-thickness-ignored")
simple(
    "JPEG 2000 of more bits than declared, padding of -32768",
    lambda: wide_jpeg_2000(-1024, -32768),
    wide_hu(-1024, -1024),
    why="beyond-bits-stored",
)
simple(
    "JPEG 2000 of more bits than declared, beyond int16",
    lambda: wide_jpeg_2000(1000, 32000),
    wide_hu(1000, 32767),
    why="saturated",
)
simple(
    "a value representation that does not exist in the file meta information",
    lambda: [after_meta(f, b"\x02\x00\x02\x01ZZ\xff\xff" + b"\x00" * 8) for f in series_files(base())],
    why="no valid value representation",
)
simple(
    "an element of 2 GiB less one in the file meta information",
    lambda: [after_meta(f, b"\x02\x00\x02\x01OB\x00\x00\xff\xff\xff\x7f") for f in series_files(base())],
    why="cut short",
)
simple(
    "an element of 2 GiB less one in the header",
    lambda: [
        before_tag(f, b"\x28\x00\x02\x00US", b"\x20\x00\xff\xffUN\x00\x00\xff\xff\xff\x7f")
        for f in series_files(base())
    ],
    why="cut short",
)
simple(
    "pixel data of 2 GiB less one",
    lambda: [
        f[:at] + b"\xff\xff\xff\x7f" + f[at + 4 :]
        for f in series_files(base())
        for at in [f.index(b"\xe0\x7f\x10\x00OW") + 8]
    ],
    why="pixel data longer than the image",
)
simple(
    "sequences nested 10,000 deep",
    lambda: [before_tag(f, b"\x10\x00\x10\x00PN", nested(10_000)) for f in series_files(base())],
    why="nested too deeply",
)
simple(
    "sequences nested 10,000 deep in an enhanced image",
    lambda: [before_tag(enhanced(base(), [5.0 * k for k in range(COUNT)]), b"\x00\x52\x29\x92", nested_late())],
    why="cannot be parsed",
)
simple(
    "a DICOMDIR that points out of its folder",
    lambda: {**{f"S2/I{i}": f for i, f in enumerate(series_files(base()))}, "DICOMDIR": disguised_dicomdir()},
    PLAIN,
)
simple("65535 rows claimed", lambda: tweaked(put(Rows=65535)), why="65535")
simple("a million frames claimed", lambda: tweaked(put(NumberOfFrames=1000000)), why="frames")


def jpeg_xl() -> list[bytes]:
    htj2k = b"1.2.840.10008.1.2.4.201"
    return [f.replace(htj2k, b"1.2.840.10008.1.2.4.110", 1) for f in series_files(base(), syntax=htj2k.decode())]


simple("a JPEG XL transfer syntax", jpeg_xl, why="JPEG XL Lossless")


def nested_late() -> bytes:
    """The same in a private group behind those that the fast walk reads."""
    return nested(10_000).replace(b"\x08\x00\x40\x11", b"\x51\x00\x40\x11")


@case("long extra fields before three members", PLAIN)
def _long_extra(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, data in enumerate(series_files(base())):
            member = zipfile.ZipInfo(f"2/I{i}")
            member.compress_type = zipfile.ZIP_DEFLATED
            if i >= 5:
                member.extra = struct.pack("<HH", 0x7777, 9000) + bytes(9000)
            archive.writestr(member, data)
    return path


@case("member names of 9,000 letters", PLAIN)
def _long_names(path: Path) -> Path:
    return zip_of(path, {f"{'long/' * 1800}I{i}": f for i, f in enumerate(series_files(base()))})


@case("a zip comment that holds the signature of its end", PLAIN)
def _comment(path: Path) -> Path:
    zip_of(path, series_files(base()))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"made by PK\x05\x06 software" + b"\x01" * 40
    return path


@case("a damaged byte in the zip", why="checksum")
def _flipped(path: Path) -> Path:
    zip_of(path, series_files(base()), zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    path.write_bytes(raw)
    return path


@case("duplicate member names", PLAIN)
def _same_names(path: Path) -> Path:
    import warnings

    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in series_files(base()):
            archive.writestr("2/IMAGE", data)
    return path


@case("a zip bomb beside the series", PLAIN, why="zip bomb")
def _bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, data in enumerate(series_files(base())):
            archive.writestr(f"2/I{i}", data)
        with archive.open("2/bomb", "w") as member:
            head = other()
            member.write(head)
            for _ in range(300):
                member.write(bytes(1 << 20))
    return path


@case("an encrypted member", why="encrypted")
def _encrypted(path: Path) -> Path:
    zip_of(path, series_files(base()))
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        local = archive.infolist()[3].header_offset
        central = archive.start_dir
    for _ in range(3):
        central = raw.index(b"PK\x01\x02", central + 4)
    raw[local + 6] |= 1
    raw[central + 8] |= 1
    path.write_bytes(raw)
    return path


@case("a truncated zip", why="truncated")
def _truncated(path: Path) -> Path:
    zip_of(path, series_files(base()))
    path.write_bytes(path.read_bytes()[:-3000])
    return path


@case("a member name that climbs out", PLAIN, why="climbs out")
def _traversal(path: Path) -> Path:
    return zip_of(path, {**{f"2/I{i}": f for i, f in enumerate(series_files(base()))}, "../../evil": other()})


@case("bytes before the zip", PLAIN)
def _stub(path: Path) -> Path:
    zip_of(path, series_files(base()))
    path.write_bytes(b"MZ self-extracting stub" * 50 + path.read_bytes())
    return path


@case("a zip inside the zip", PLAIN, why="an archive within the archive (zip)")
def _nested(path: Path) -> Path:
    inner = zip_of(path.with_suffix(".inner"), series_files(base(1))).read_bytes()
    path.with_suffix(".inner").unlink()
    return zip_of(path, {**{f"2/I{i}": f for i, f in enumerate(series_files(base()))}, "old.zip": inner})
