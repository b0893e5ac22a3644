"""Odd archives, each with what a reader should make of it: the volumes inside, or a refusal with a reason.

Used twice: `test_odd_inputs.py` holds ctpipe to it, `infra/bench/odd_inputs.py` shows what other readers do.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
simple("65535 rows claimed", lambda: tweaked(put(Rows=65535)), why="65535")
simple("a million frames claimed", lambda: tweaked(put(NumberOfFrames=1000000)), why="frames")


def jpeg_xl() -> list[bytes]:
    htj2k = b"1.2.840.10008.1.2.4.201"
    return [f.replace(htj2k, b"1.2.840.10008.1.2.4.110", 1) for f in series_files(base(), syntax=htj2k.decode())]


simple("a JPEG XL transfer syntax", jpeg_xl, why="JPEG XL Lossless")


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


@case("a zip inside the zip", PLAIN)
def _nested(path: Path) -> Path:
    inner = zip_of(path.with_suffix(".inner"), series_files(base(1))).read_bytes()
    path.with_suffix(".inner").unlink()
    return zip_of(path, {**{f"2/I{i}": f for i, f in enumerate(series_files(base()))}, "old.zip": inner})
