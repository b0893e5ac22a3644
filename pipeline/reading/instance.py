"""One frame of a DICOM file as series assembly sees it: identity, geometry, how its pixels are stored and scaled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.reading.codecs import SampleFormat
from pipeline.reading.header import Header

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT Image Storage",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT Image Storage",
}
MULTIFRAME_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2"})
_OTHER_CLASSES = (
    ("1.2.840.10008.5.1.4.1.1.7", "secondary capture"),
    ("1.2.840.10008.5.1.4.1.1.88", "structured report, such as a dose report"),
    ("1.2.840.10008.5.1.4.1.1.4", "MR image"),
    ("1.2.840.10008.5.1.4.1.1.128", "PET image"),
    ("1.2.840.10008.5.1.4.1.1.130", "PET image"),
    ("1.2.840.10008.5.1.4.1.1.20", "nuclear medicine image"),
    ("1.2.840.10008.5.1.4.1.1.6", "ultrasound image"),
    ("1.2.840.10008.5.1.4.1.1.1", "projection radiograph"),
    ("1.2.840.10008.5.1.4.1.1.2.", "CT object that is not an image"),
    ("1.2.840.10008.5.1.4.1.1.11", "presentation state"),
    ("1.2.840.10008.5.1.4.1.1.66", "segmentation, registration or raw data"),
    ("1.2.840.10008.5.1.4.1.1.481", "radiotherapy object"),
    ("1.2.840.10008.5.1.4.1.1.104", "encapsulated document"),
    ("1.2.840.10008.5.1.4.1.1.9", "waveform"),
    ("1.2.840.10008.5.1.4.1.1.77", "photograph or video"),
)
_HOUNSFIELD = frozenset({"HU", "H.U.", "HOUNSFIELD", "HOUNSFIELD UNIT", "HOUNSFIELD UNITS"})


Vector3 = tuple[float, float, float]


@dataclass(slots=True)
class Instance:
    """A frame and where it is. ``member`` and ``frame`` address it within its source.

    ``orientation`` holds the row and column direction cosines; ``padding`` the inclusive range of stored values that
    mark pixels outside the field of view (PS3.3 C.7.5.1.1.2). ``slope`` and ``intercept`` are None where absent.
    """

    header: Header
    member: int
    frame: int
    size: int
    crc32: int | None
    sop_class: str
    sop_uid: str
    series_uid: str
    study_uid: str
    patient_id: str
    frame_uid: str
    image_type: tuple[str, ...]
    form: SampleFormat
    samples: int
    frames: int
    position: Vector3 | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, float] | None
    thickness_mm: float
    slope: float | None
    intercept: float | None
    rescale_type: str
    photometric: str
    padding: tuple[int, int] | None
    kernel: str
    acquisition: str
    tilt_deg: float
    labels: dict[str, str]
    """Values that may tell apart several volumes under one series UID: KVP, cardiac phase, acquisition time, ..."""


def other_class(sop_class: str) -> str:
    """Return the kind of an instance, in words, if it is no CT image; an empty string for a CT image."""
    if sop_class in CT_CLASSES:
        return ""
    for prefix, name in _OTHER_CLASSES:
        if sop_class.startswith(prefix):
            return name
    return "DICOM object of another kind"


def instance_of(header: Header, member: int, size: int, crc32: int | None) -> Instance:
    """The single frame of a classic file. Values that are missing or no numbers stay visible as None or NaN."""
    h = header
    thickness = h.number(0x00180050)
    if thickness is not None and thickness < 0:
        h.notes = (*h.notes, "negative-thickness-ignored")
    form = SampleFormat(
        rows=h.short(0x00280010) or 0,
        columns=h.short(0x00280011) or 0,
        bits_allocated=h.short(0x00280100) or 0,
        bits_stored=h.short(0x00280101) or 0,
        high_bit=h.short(0x00280102) or 0,
        signed=h.short(0x00280103) == 1,
    )
    frames = h.number(0x00280008)
    return Instance(
        header=h,
        member=member,
        frame=0,
        size=size,
        crc32=crc32,
        sop_class=h.text(0x00080016) or h.media_class,
        sop_uid=h.text(0x00080018),
        series_uid=h.text(0x0020000E),
        study_uid=h.text(0x0020000D),
        patient_id=h.text(0x00100020),
        frame_uid=h.text(0x00200052),
        image_type=tuple(part.upper() for part in h.texts(0x00080008)),
        form=form,
        samples=h.short(0x00280002) or 1,
        frames=int(frames) if frames is not None and math.isfinite(frames) else 1,
        position=as_vector(h.numbers(0x00200032)),
        orientation=as_cosines(h.numbers(0x00200037)),
        pixel_spacing=as_spacing(h.numbers(0x00280030)),
        thickness_mm=as_thickness(thickness),
        slope=h.number(0x00281053),
        intercept=h.number(0x00281052),
        rescale_type=as_rescale_type(h.text(0x00281054)),
        photometric=h.text(0x00280004).upper(),
        padding=padding_range(h, form.signed),
        kernel=h.text(0x00181210),
        acquisition=h.text(0x00200012),
        tilt_deg=h.number(0x00181120) or 0.0,
        labels={
            "acquisition": h.text(0x00200012),
            "kvp": h.text(0x00180060),
            "type": h.text(0x00080008).upper(),
            "temporal-position": h.text(0x00200100),
            "cardiac-phase": as_label(h.real(0x00209241)),
            "cardiac-delay": as_label(h.real(0x00209153)),
            "trigger-time": h.text(0x00181060),
            "contrast": h.text(0x00180010),
            "thickness": h.text(0x00180050),
            "acquisition-time": h.text(0x0008002A) or h.text(0x00080022) + h.text(0x00080032),
            "series-number": h.text(0x00200011),
        },
    )


def as_label(value: float | None) -> str:
    """A number as the label of a volume; a phase of 0% is one, an absent phase is none."""
    return "" if value is None else f"{value:g}"


def as_thickness(value: float | None) -> float:
    """SliceThickness (0018,0050) in mm; 0 where it is absent or no length."""
    return value if value is not None and math.isfinite(value) and value > 0 else 0.0


def as_rescale_type(text: str) -> str:
    """RescaleType (0028,1054) in capitals; ``HU`` for the spellings that some scanners and converters write."""
    text = text.upper()
    return "HU" if text in _HOUNSFIELD else text


def as_vector(values: tuple[float, ...]) -> Vector3 | None:
    """Three finite lengths in mm, below 10 m, or None."""
    if len(values) == 3 and all(math.isfinite(v) and abs(v) < 1e4 for v in values):
        return (values[0], values[1], values[2])
    return None


def as_cosines(values: tuple[float, ...]) -> tuple[float, ...] | None:
    """Row and column direction if they are unit vectors at right angles (to 1e-3, as scanners round), or None."""
    if len(values) != 6 or not all(math.isfinite(v) for v in values):
        return None
    row, column = values[:3], values[3:]
    lengths = math.hypot(*row), math.hypot(*column)
    across = sum(a * b for a, b in zip(row, column, strict=True))
    return values if all(abs(v - 1) < 1e-3 for v in lengths) and abs(across) < 1e-3 else None


def as_spacing(values: tuple[float, ...]) -> tuple[float, float] | None:
    """Distance between rows and between columns in mm, or None."""
    if len(values) == 2 and all(math.isfinite(v) and 1e-3 < v < 100 for v in values):
        return (values[0], values[1])
    return None


def padding_range(header: Header, signed: bool) -> tuple[int, int] | None:
    """Stored values that mean "no image here": PixelPaddingValue up to PixelPaddingRangeLimit, either way round.

    Both are US or SS as PixelRepresentation says, whatever VR the file claims (PS3.5 A.2, note on ambiguous VRs).
    """
    order = "little" if header.little else "big"
    bounds = []
    for tag in (0x00280120, 0x00280121):
        raw = header.elements.get(tag, b"")
        if len(raw) == 2:
            bounds.append(int.from_bytes(raw, order, signed=signed))  # type: ignore[arg-type]
    return (min(bounds), max(bounds)) if bounds and header.elements.get(0x00280120) else None
