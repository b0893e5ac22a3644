"""Header facts that may leave private/: numbers in a plausible range and words of a closed vocabulary, nothing else.

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
    access mx gemini big bore core aquilion activion alexion asteion one prime lightning precision
    start genesis naeotom alpha scenaria eclos supria uct umi neuviz ceretom bodytom omnitom phantom
    pro elite ultra x xr hd st ste es rx rt mi iq qx i ct/i nx dual tf lb sp cx rxl exceed serve open sim
    duo zoom volume balance cite peak view tx
    """
)
_MODEL_NUMBERS = _words(
    """
    1 2 3 4 5 6 8 10 12 16 20 24 32 40 64 80 128 160 256 320 510 520 528 530 540 550 560 570 580 590 600 610 660
    670 680 690 710 750 760 780 820 860 890 960 3000 5300 6000 7500 7700 8000 4R 128S
    """
)
"""Detector rows and type numbers of scanners on the market; any other number may be a date or an id."""
_KERNEL_WORDS = _words(
    """
    STANDARD STD STD+ STND SOFT SOFT+ LUNG LUNG+ BONE BONE+ BONEPLUS DETAIL EDGE CHST CHEST ULTRA SMOOTH
    SHARP BRAIN BODY MEDIUM NORMAL HEAD B_SOFT_A B_SOFT_B B_SHARP_A B_SHARP_B B_SHARP_C H_SOFT_A
    H_SOFT_B H_SHARP_A B_VSOFT_B B_SMTH_A B_SMTH_B LUNG_A LUNG_B
    A B C D E F L EA EB EC IA IB UA UB UC XA XB XC YA YB YC YD YE HRC
    """
)
"""Names that vendors give their kernels; the last line are those of one that calls them by letters."""
_KERNEL_PATTERN = re.compile(r"(B[dflmnruv]?|D|H[cfmnprv]?|I|J|Qr?|S[ad]|T|U[bfr]?)\d{2}[a-z]?\+?|F[CL]\d{2}(-H)?|\d")
"""A body region or purpose and two digits for the sharpness (``Br38f``, ``H30s``, ``FC08``), or a strength alone."""


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
    """A scanner's model name, else an empty string.

    All its words must be known ones. One known type number may stand alone (``Sensation 64``) and one behind a word
    (``CT750``): more of them could spell a date.
    """
    words = attached = alone = 0
    for token in filter(None, re.split(r"[\s\-_.,()]+", text)):
        word, number = token.lower(), ""
        if word not in _MODEL_WORDS and token.upper() not in _MODEL_NUMBERS:
            word = word.rstrip("0123456789")
            number = token[len(word) :]
            if word not in _MODEL_WORDS or number not in _MODEL_NUMBERS:
                return ""
        words += word in _MODEL_WORDS
        attached += bool(number)
        alone += word not in _MODEL_WORDS
    return text if words and attached <= 1 and alone <= 1 else ""


def known_kernel(text: str) -> str:
    r"""A reconstruction kernel in a vendor's own spelling (``Br38f\3``, ``FC08``, ``STANDARD``), else empty."""
    parts = [part.strip() for part in text.split("\\")]
    fine = len(parts) <= 2 and all(part.upper() in _KERNEL_WORDS or _KERNEL_PATTERN.fullmatch(part) for part in parts)
    return "\\".join(parts) if text and fine else ""


def identity_facts(header: Header) -> dict[str, Any]:
    """Return who was scanned and when, by DICOM keyword, in the file's character set; never leaves private/."""
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
