"""Which header facts may leave private/: numbers in a plausible range and words of a closed vocabulary, nothing else.

Free text is never copied, not even from attributes that "should" hold a vendor's name: operators type into them.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

from pipeline.reading.header import Header


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NUMBERS: dict[str, tuple[int, float, float]] = {
    "SliceThickness": (0x00180050, 0.0, 100.0),
    "KVP": (0x00180060, 10.0, 300.0),
    "SpacingBetweenSlices": (0x00180088, -100.0, 100.0),
    "DataCollectionDiameter": (0x00180090, 0.0, 1500.0),
    "ReconstructionDiameter": (0x00181100, 0.0, 1500.0),
    "DistanceSourceToDetector": (0x00181110, 0.0, 5000.0),
    "DistanceSourceToPatient": (0x00181111, 0.0, 5000.0),
    "GantryDetectorTilt": (0x00181120, -90.0, 90.0),
    "TableHeight": (0x00181130, -1000.0, 1000.0),
    "ExposureTime": (0x00181150, 0.0, 99999.0),
    "XRayTubeCurrent": (0x00181151, 0.0, 5000.0),
    "Exposure": (0x00181152, 0.0, 5000.0),
    "LossyImageCompressionRatio": (0x00282112, 0.0, 1000.0),
}
_DOUBLES: dict[str, tuple[int, float, float]] = {
    "RevolutionTime": (0x00189305, 0.0, 60.0),
    "SingleCollimationWidth": (0x00189306, 0.0, 200.0),
    "TotalCollimationWidth": (0x00189307, 0.0, 500.0),
    "TableSpeed": (0x00189309, 0.0, 2000.0),
    "TableFeedPerRotation": (0x00189310, 0.0, 500.0),
    "SpiralPitchFactor": (0x00189311, 0.0, 10.0),
    "CTDIvol": (0x00189345, 0.0, 1000.0),
}
_INTEGERS = frozenset({"ExposureTime", "XRayTubeCurrent", "Exposure"})
_CODES: dict[str, tuple[int, frozenset[str]]] = {
    "Modality": (0x00080060, frozenset({"CT"})),
    "BodyPartExamined": (
        0x00180015,
        _words(
            """
    ABDOMEN ABDOMENPELVIS AORTA ARM BRAIN BREAST CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE EXTREMITY FOOT
    HAND HEAD HEADNECK HEART HIP KNEE LEG LIVER LSPINE LUNG NECK NECKCHEST PELVIS SHOULDER SINUS SKULL
    SPINE THORAX TSPINE WHOLEBODY
    """
        ),
    ),
    "PatientPosition": (0x00185100, _words("HFS HFP HFDL HFDR FFS FFP FFDL FFDR LFS LFP RFS RFP")),
    "RotationDirection": (0x00181140, frozenset({"CW", "CC"})),
    "RescaleType": (0x00281054, frozenset({"HU"})),
    "BurnedInAnnotation": (0x00280301, frozenset({"YES", "NO"})),
    "LossyImageCompression": (0x00282110, frozenset({"00", "01"})),
    "LossyImageCompressionMethod": (
        0x00282114,
        frozenset({"ISO_10918_1", "ISO_14495_1", "ISO_15444_1", "ISO_15444_15"}),
    ),
}
_IMAGE_TYPE_WORDS = _words(
    """
    ORIGINAL DERIVED PRIMARY SECONDARY AXIAL HELICAL SPIRAL VOLUME LOCALIZER REFORMATTED MPR MPVR
    AVERAGE MIP MINIP ADD NORM RESAMPLED NONE
    """
)
_MANUFACTURERS = (
    (re.compile(r"^siemens\b", re.I), "Siemens Healthineers"),
    (re.compile(r"^(ge medical|ge healthcare|ge$|general electric)", re.I), "GE MEDICAL SYSTEMS"),
    (re.compile(r"^philips\b", re.I), "Philips"),
    (re.compile(r"^canon\b", re.I), "Canon Medical Systems"),
    (re.compile(r"^toshiba\b", re.I), "TOSHIBA"),
    (re.compile(r"^hitachi\b", re.I), "Hitachi"),
    (re.compile(r"^fujifilm\b", re.I), "FUJIFILM"),
    (re.compile(r"^(uih|united imaging)\b", re.I), "UIH"),
    (re.compile(r"^neusoft\b", re.I), "NeuSoft"),
    (re.compile(r"^(samsung|neurologica)\b", re.I), "NeuroLogica"),
    (re.compile(r"^shimadzu\b", re.I), "SHIMADZU"),
    (re.compile(r"^picker\b", re.I), "Picker"),
    (re.compile(r"^elscint\b", re.I), "Elscint"),
    (re.compile(r"^ctpipe\b", re.I), "ctpipe"),
)
_MODEL_WORDS = _words(
    """
    lightspeed discovery revolution optima brightspeed hispeed prospeed vct ct ctxt evo maxima frontier
    apex somatom sensation definition emotion force drive edge flash as go up now all top perspective
    spirit scope confidence biograph mct vision plus ingenuity brilliance ict iqon spectral incisive
    access mx8000 gemini big bore core aquilion activion alexion asteion one prime lightning precision
    start genesis vision naeotom alpha scenaria eclos supria uct neuviz ceretom bodytom omnitom phantom
    pro plus elite ultra x xr hd st
    """
)
_KERNEL_WORDS = _words(
    """
    STANDARD STD STD+ SOFT SOFT+ LUNG LUNG+ BONE BONE+ BONEPLUS DETAIL EDGE CHST CHEST ULTRA SMOOTH
    SHARP BRAIN BODY MEDIUM NORMAL HEAD B_SOFT_A B_SOFT_B B_SHARP_A B_SHARP_B B_SHARP_C H_SOFT_A
    H_SOFT_B H_SHARP_A B_VSOFT_B B_SMTH_A B_SMTH_B LUNG_A LUNG_B
    """
)
_KERNEL_PATTERN = re.compile(r"[A-Z][A-Za-z]{0,2}(\d{1,2}[a-z]?)?\+?|\d")
_TOKEN = re.compile(r"\d{1,4}[A-Z]?|[A-Za-z]{1,2}\d{0,3}")


_IDENTITY = {
    0x00100010: "PatientName",
    0x00100020: "PatientID",
    0x00100021: "IssuerOfPatientID",
    0x00100030: "PatientBirthDate",
    0x00100040: "PatientSex",
    0x00101010: "PatientAge",
    0x0020000D: "StudyInstanceUID",
    0x0020000E: "SeriesInstanceUID",
    0x00200052: "FrameOfReferenceUID",
    0x00080020: "StudyDate",
    0x00080030: "StudyTime",
    0x00080021: "SeriesDate",
    0x00080031: "SeriesTime",
    0x00080050: "AccessionNumber",
    0x00200010: "StudyID",
    0x00200011: "SeriesNumber",
    0x00080090: "ReferringPhysicianName",
    0x00081030: "StudyDescription",
    0x0008103E: "SeriesDescription",
    0x00181020: "SoftwareVersions",
    0x00181210: "ConvolutionKernel",
}


def public_facts(header: Header) -> dict[str, Any]:
    """Acquisition facts by DICOM keyword that identify nobody."""
    facts: dict[str, Any] = {}
    for keyword, (tag, low, high) in _NUMBERS.items():
        number = header.number(tag)
        if number is not None and math.isfinite(number) and low <= number <= high:
            facts[keyword] = round(number) if keyword in _INTEGERS else number
    for keyword, (tag, low, high) in _DOUBLES.items():
        number = header.double(tag)
        if number is not None and math.isfinite(number) and low <= number <= high:
            facts[keyword] = number
    for keyword, (tag, allowed) in _CODES.items():
        code = header.text(tag).upper()
        if code in allowed:
            facts[keyword] = code
    words = [word for word in (part.upper() for part in header.texts(0x00080008)) if word in _IMAGE_TYPE_WORDS]
    if words:
        facts["ImageType"] = words
    names = {
        "Manufacturer": known_manufacturer(header.text(0x00080070)),
        "ManufacturerModelName": known_model(header.text(0x00081090)),
        "ConvolutionKernel": known_kernel(header.text(0x00181210)),
    }
    return facts | {keyword: name for keyword, name in names.items() if name}


def known_manufacturer(text: str) -> str:
    """The vendor's name in one spelling, or an empty string for an unknown one."""
    return next((name for pattern, name in _MANUFACTURERS if pattern.search(text)), "")


def known_model(text: str) -> str:
    """A scanner's model name, if all its words are known ones or short type numbers, else an empty string."""
    tokens = [token for token in re.split(r"[\s\-_/.,()]+", text) if token]
    known = [token.lower().rstrip("0123456789") in _MODEL_WORDS for token in tokens]
    fine = any(known) and all(k or _TOKEN.fullmatch(t) for k, t in zip(known, tokens, strict=True))
    return text if fine else ""


def known_kernel(text: str) -> str:
    """A reconstruction kernel in a vendor's own spelling (``Br38f\\3``, ``FC08``, ``STANDARD``), else empty."""
    parts = [part.strip() for part in text.split("\\")]
    fine = all(part.upper() in _KERNEL_WORDS or _KERNEL_PATTERN.fullmatch(part) for part in parts)
    return "\\".join(parts) if text and fine else ""


def identity_facts(header: Header) -> dict[str, Any]:
    """Who and when, by DICOM keyword, as text in the file's own character set; never leaves private/."""
    facts: dict[str, Any] = {}
    for tag, keyword in _IDENTITY.items():
        raw = header.elements.get(tag, b"").strip(b" \0")
        if raw:
            facts[keyword] = raw.decode() if raw.isascii() and b"\x1b" not in raw else _decode(raw, header)
    return facts


def _decode(raw: bytes, header: Header) -> str:
    from pydicom.charset import convert_encodings, decode_bytes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a byte that its own character set lacks is replaced, not a fault of the image
        return decode_bytes(raw, convert_encodings(_charset(header)), {0x5C, 0x5E, 0x3D}).strip()


def _charset(header: Header) -> list[str]:
    known = [
        part for part in header.texts(0x00080005) if re.fullmatch(r"(ISO_IR |ISO 2022 IR )\d{1,3}|GB18030|GBK", part)
    ]
    return known or ["ISO_IR 100"]
