"""The dataset that all slices of a derived CT series share, and its encoding around the elements that differ."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset, write_file_meta_info
from pydicom.uid import UID
from pydicom.valuerep import format_number_as_ds

from pipeline.volume import Geometry, SourceHeader
from pipeline.writing.pixel_data import PixelFormat
from pipeline.writing.provenance import (
    ALGORITHM,
    Provenance,
    add_provenance,
    coded,
    mark_compression,
    package_version,
)
from pipeline.writing.series_identity import SeriesIdentity, derived_uid

CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
IMPLEMENTATION_UID = derived_uid("implementation", ALGORITHM)


CARRIED_KEYWORDS = (
    "Manufacturer",
    "ManufacturerModelName",
    "BodyPartExamined",
    "ScanOptions",
    "KVP",
    "DataCollectionDiameter",
    "ReconstructionDiameter",
    "DistanceSourceToDetector",
    "DistanceSourceToPatient",
    "GantryDetectorTilt",
    "TableHeight",
    "RotationDirection",
    "ExposureTime",
    "XRayTubeCurrent",
    "Exposure",
    "FilterType",
    "GeneratorPower",
    "FocalSpots",
    "ConvolutionKernel",
    "RevolutionTime",
    "SingleCollimationWidth",
    "TotalCollimationWidth",
    "TableSpeed",
    "TableFeedPerRotation",
    "SpiralPitchFactor",
    "PatientPosition",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
)
"""Acquisition facts of the source that stay true of the derived series and name nobody (CT Image module, C.8.2.1)."""


_UNPAIRED = (
    "ABDOMEN ABDOMENPELVIS AORTA BRAIN CHEST CHESTABDOMEN CHESTABDPELVIS CSPINE HEAD HEADNECK HEART LIVER LSPINE NECK"
    " NECKCHEST PELVIS SKULL SPINE TSPINE WHOLEBODY"
)
UNPAIRED_BODY_PARTS = frozenset(_UNPAIRED.split())


def implementation_version() -> str:
    """Return our ImplementationVersionName, at most 16 characters (DICOM PS3.7 D.3.3.2)."""
    return f"{ALGORITHM} {package_version()}"[:16]


def spell_number(value: float) -> str:
    """A decimal string of at most 16 characters (VR DS, DICOM PS3.5 6.2)."""
    return format_number_as_ds(float(value))


def series_dataset(
    geometry: Geometry,
    source: SourceHeader,
    identity: SeriesIdentity,
    provenance: Provenance,
    pixels: PixelFormat,
    *,
    series_uid: str,
    series_number: int,
) -> Dataset:
    """Everything but the elements that differ from slice to slice (SOPInstanceUID, number, position, pixels)."""
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    add_patient_and_study(ds, identity)
    _add_acquisition(ds, source)
    description, image_type = described(provenance)
    ds.ImageType = list(image_type)
    ds.SOPClassUID = CT_IMAGE_STORAGE
    ds.Modality = "CT"
    ds.SeriesInstanceUID = series_uid
    ds.SeriesNumber = series_number
    ds.SeriesDescription = description
    ds.AcquisitionNumber = None
    ds.PositionReferenceIndicator = ""
    if ds.get("BodyPartExamined", "") not in UNPAIRED_BODY_PARTS:
        ds.Laterality = ""  # type 2C (C.7.3.1): empty means unknown; forbidden where the body part is unpaired
    mark_compression(ds, source.public, provenance)
    # Text in the source's pixels is still there to be read in what was made from them.
    ds.BurnedInAnnotation = str(source.public.get("BurnedInAnnotation") or "NO")
    _add_image(ds, geometry, pixels, provenance.window)
    add_provenance(ds, provenance, identity.source_sop_uids, identity.source_sop_class)
    return ds


def multi_frame_dataset(identity: SeriesIdentity, provenance: Provenance) -> Dataset:
    """Return the data set that an enhanced image and a parametric map begin with: patient, study, provenance.

    How a frame was derived is stated in a functional group there.
    """
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    add_patient_and_study(ds, identity)
    add_provenance(ds, provenance, (), identity.source_sop_class)
    del ds.DerivationDescription, ds.DerivationCodeSequence
    return ds


def add_patient_and_study(ds: Dataset, identity: SeriesIdentity) -> None:
    """Patient, General Study and Frame of Reference modules (PS3.3 C.7.1.1, C.7.2.1, C.7.4.1); type 2 may be empty."""
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex"):
        setattr(ds, keyword, "")
    for keyword in ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"):
        setattr(ds, keyword, "")
    for keyword, value in identity.patient.items():
        setattr(ds, keyword, value)
    if not identity.restored:
        add_deidentification(ds)
    ds.StudyInstanceUID = identity.study_uid
    ds.FrameOfReferenceUID = identity.frame_uid


def add_deidentification(ds: Dataset) -> None:
    """Say in DICOM's own terms how identity was removed (PS3.15 E.1, E.2; codes of PS3.16 CID 7050).

    The Basic Profile alone: names and ids become keys, UIDs are replaced, dates and all free text are dropped. No
    option is claimed: none of the Retain options is used, and neither pixels nor recognizable features are cleaned.
    """
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = f"{ALGORITHM}: keyed pseudonyms, allow-listed attributes only"
    ds.DeidentificationMethodCodeSequence = coded("113100", "DCM", "Basic Application Confidentiality Profile")
    ds.LongitudinalTemporalInformationModified = "REMOVED"


def _add_acquisition(ds: Dataset, source: SourceHeader) -> None:
    for keyword in CARRIED_KEYWORDS:
        value = source.public.get(keyword)
        if value not in (None, ""):
            as_decimal_string = isinstance(value, float) and dictionary_VR(keyword) == "DS"
            setattr(ds, keyword, spell_number(value) if as_decimal_string else value)
    for keyword, absent in (("Manufacturer", ""), ("KVP", None), ("PatientPosition", "HFS")):
        if keyword not in ds:
            setattr(ds, keyword, absent)


def _add_image(ds: Dataset, geometry: Geometry, pixels: PixelFormat, window: tuple[float, float]) -> None:
    """Image Plane, Image Pixel and CT Image modules (PS3.3 C.7.6.2, C.7.6.3, C.8.2.1)."""
    dz, dy, dx = geometry.spacing_mm_zyx
    row_step, column_step = geometry.affine[:3, 2], geometry.affine[:3, 1]
    ds.ImageOrientationPatient = [spell_number(v) for v in (*(row_step / dx), *(column_step / dy))]
    ds.PixelSpacing = [spell_number(dy), spell_number(dx)]
    ds.SliceThickness = spell_number(geometry.thickness_mm)
    ds.SpacingBetweenSlices = spell_number(dz)
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.Rows, ds.Columns = geometry.shape_zyx[1:]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(pixels.signed)
    ds.RescaleIntercept = spell_number(pixels.intercept)
    ds.RescaleSlope = spell_number(pixels.slope)
    ds.RescaleType = "HU"
    ds.WindowCenter, ds.WindowWidth = (spell_number(v) for v in window)


def element(group: int, number: int, vr: str, text: str) -> bytes:
    """One short element in explicit VR little endian, padded to even length (DICOM PS3.5 6.2, 7.1.2)."""
    raw = text.encode("ascii")
    if len(raw) % 2:
        raw += b"\0" if vr == "UI" else b" "
    tag = group.to_bytes(2, "little") + number.to_bytes(2, "little")
    return tag + vr.encode() + len(raw).to_bytes(2, "little") + raw


def file_prefix(transfer_syntax: UID, sop_instance_uid: str, sop_class: str = CT_IMAGE_STORAGE) -> bytes:
    """Preamble and file meta information of one instance (DICOM PS3.10 7.1)."""
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = UID(sop_class)
    meta.MediaStorageSOPInstanceUID = UID(sop_instance_uid)
    meta.TransferSyntaxUID = transfer_syntax
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    meta.ImplementationVersionName = implementation_version()
    buffer = DicomBytesIO()
    buffer.write(bytes(128) + b"DICM")
    write_file_meta_info(buffer, meta)
    return bytes(buffer.getvalue())


class SharedHeader:
    """A dataset encoded once, into which each slice weaves the slice's elements in tag order."""

    def __init__(self, shared: Dataset, varying_tags: Sequence[int]) -> None:
        """``varying_tags``: ascending tags, none of them in ``shared``, that every slice brings itself."""
        self.varying_tags = tuple(varying_tags)
        bounds = (0, *self.varying_tags, 1 << 32)
        self._runs = [encode_dataset(shared, low, high) for low, high in itertools.pairwise(bounds)]

    def weave(self, elements: Mapping[int, bytes]) -> bytes:
        """The encoded dataset with this slice's elements, one for every varying tag."""
        parts = [self._runs[0]]
        for tag, run in zip(self.varying_tags, self._runs[1:], strict=True):
            parts += (elements[tag], run)
        return b"".join(parts)


def encode_dataset(ds: Dataset, low: int = 0, high: int = 1 << 32) -> bytes:
    """The elements with tags in [low, high) in explicit VR little endian."""
    part = Dataset()
    for elem in ds:
        if low <= int(elem.tag) < high:
            part.add(elem)
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, part, parent_encoding="utf-8")
    return bytes(buffer.getvalue())


def described(provenance: Provenance) -> tuple[str, tuple[str, ...]]:
    """SeriesDescription (at most 64 characters, VR LO) and ImageType of a kind of series."""
    spacing = f"{provenance.spacing_mm:g} mm"
    axial = ("DERIVED", "SECONDARY", "AXIAL")
    if provenance.kind == "uncertainty":
        return f"{ALGORITHM} uncertainty (SD in HU) {spacing}"[:64], (*axial, "UNCERTAINTY")
    if provenance.kind == "alarm":
        return f"{ALGORITHM} fabrication alarm {spacing}"[:64], (*axial, "ALARM")
    word = "synthetic" if provenance.kind == "generated" else "latent round trip"
    answer = f" ({provenance.answer})" if provenance.answer else ""
    return f"{ALGORITHM} {word}{answer} {spacing}"[:64], axial
