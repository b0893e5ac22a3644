"""A derived series as one Enhanced CT Image Storage instance (DICOM PS3.3 A.38.1), where the source allows it.

The functional groups are those that a derived image needs: what only an original acquisition must tell (exposure,
reconstruction, table dynamics) is not invented. What the IOD does require and the source does not say is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.tag import Tag

from latentcache import InputError
from latentcache.storage import atomic_folder, refuse_existing, sync_file
from pipeline.volume import Geometry, SourceHeader
from pipeline.writing.ct_image import SERIES_NUMBER, WrittenSeries, series_digest
from pipeline.writing.dataset import SharedHeader, described, file_prefix, multi_frame_dataset, spell_number
from pipeline.writing.pixel_data import PixelFormat, frames_element, transfer_syntax_uid
from pipeline.writing.provenance import Provenance, coded, mark_compression
from pipeline.writing.series_identity import SeriesIdentity, derived_uid

ENHANCED_CT_IMAGE_STORAGE = "1.2.840.10008.5.1.4.1.1.2.1"
FILE_NAME = "00001.dcm"
LARGEST_PIXEL_DATA = (1 << 32) - 2


REGIONS = {
    "ABDOMEN": ("818981001", "Abdomen"),
    "ABDOMENPELVIS": ("818982008", "Abdomen and Pelvis"),
    "CHEST": ("816094009", "Chest"),
    "THORAX": ("816094009", "Chest"),
    "CHESTABDOMEN": ("416550000", "Chest and Abdomen"),
    "CHESTABDPELVIS": ("416775004", "Chest, Abdomen and Pelvis"),
    "CSPINE": ("122494005", "Cervical spine"),
    "HEAD": ("69536005", "Head"),
    "HEADNECK": ("774007", "Head and Neck"),
    "HEART": ("80891009", "Heart"),
    "LSPINE": ("122496007", "Lumbar spine"),
    "NECK": ("45048000", "Neck"),
    "NECKCHEST": ("417437006", "Neck and Chest"),
    "PELVIS": ("816092008", "Pelvis"),
    "SKULL": ("89546000", "Skull"),
    "SPINE": ("421060004", "Spine"),
    "TSPINE": ("122495006", "Thoracic spine"),
    "WHOLEBODY": ("38266002", "Entire body"),
}
"""BodyPartExamined to the coded region (SNOMED CT) of the Frame Anatomy macro; all unpaired (PS3.16 L and CID 4031)."""


def check_enhanced(header: SourceHeader) -> None:
    """Refuse a source that lacks what Enhanced CT requires of it, naming the attributes.

    Manufacturer and model are type 1 in Enhanced General Equipment (C.7.5.2), the anatomic region in Frame Anatomy
    (C.7.6.16.2.8). The device's serial number is type 1 too; a dummy takes its place, as de-identification has it
    (PS3.15 E.1, action D).

    Raises:
        InputError: Attributes are missing.
    """
    if header.public.get("BurnedInAnnotation") == "YES":
        raise InputError(
            "a source with text in its pixels (Burned In Annotation YES)",
            expected="none, as Enhanced CT Image Storage requires (DICOM PS3.3 C.8.15.2)",
            remedy="Write CT Image Storage instead, which says so: leave --enhanced away.",
        )
    missing = [k for k in ("Manufacturer", "ManufacturerModelName") if not header.public.get(k)]
    if str(header.public.get("BodyPartExamined", "")).upper() not in REGIONS:
        missing.append("BodyPartExamined (one with a known anatomic region)")
    if missing:
        raise InputError(
            f"a source without {', '.join(missing)}",
            expected="what Enhanced CT Image Storage requires (DICOM PS3.3 A.38.1)",
            remedy="Write CT Image Storage instead: leave --enhanced away.",
        )


def write_enhanced_ct(
    hu: NDArray[np.int16],
    geometry: Geometry,
    header: SourceHeader,
    out_dir: Path,
    *,
    uids: SeriesIdentity,
    provenance: Provenance,
    transfer_syntax: str = "explicit",
) -> WrittenSeries:
    """Write all slices as the frames of one file in a new folder, which appears whole or not at all.

    Args:
        hu: (z, y, x) int16 HU in the order of ``geometry.z_mm``.

    Raises:
        InputError: ``out_dir`` exists, the source lacks what the IOD requires, or the pixels exceed 4 GiB.
    """
    if hu.dtype != np.int16 or hu.shape != geometry.shape_zyx:
        raise AssertionError(f"{hu.dtype} {hu.shape} does not fit {geometry.shape_zyx}")
    syntax = transfer_syntax_uid(transfer_syntax)
    check_enhanced(header)
    refuse_existing(out_dir)
    if hu.nbytes > LARGEST_PIXEL_DATA:
        raise InputError(
            f"{hu.nbytes / 2**30:.1f} GiB of pixels in one instance", expected="4 GiB at most", remedy="Write slices."
        )
    pixels = PixelFormat.of(hu, transfer_syntax)
    digest = series_digest(hu, geometry, uids, provenance)
    series_uid, sop_uid = derived_uid("enhanced-series", digest), derived_uid("enhanced-instance", digest)
    ds = _dataset(geometry, header, uids, provenance, pixels, series_uid, sop_uid)
    head = SharedHeader(ds, ()).weave({})
    with atomic_folder(out_dir) as partial:
        with (partial / FILE_NAME).open("wb") as file:
            file.write(file_prefix(syntax, sop_uid, ENHANCED_CT_IMAGE_STORAGE))
            file.write(head)
            for piece in frames_element(_stored(hu, pixels), len(hu), hu[0].nbytes, transfer_syntax):
                file.write(piece)
        sync_file(partial / FILE_NAME)
    return WrittenSeries((out_dir / FILE_NAME,), series_uid, uids.study_uid, (sop_uid,))


def _stored(hu: NDArray[np.int16], pixels: PixelFormat) -> Iterator[NDArray[Any]]:
    for one in hu:
        yield pixels.stored(one)


def _dataset(
    geometry: Geometry,
    header: SourceHeader,
    identity: SeriesIdentity,
    provenance: Provenance,
    pixels: PixelFormat,
    series_uid: str,
    sop_uid: str,
) -> Dataset:
    """Everything but the pixels."""
    ds = multi_frame_dataset(identity, provenance)
    ds.ContentQualification = "RESEARCH"
    ds.SourceImageEvidenceSequence = DicomSequence([evidence_item(header, identity, provenance)])
    description, _ = described(provenance)
    ds.SOPClassUID, ds.SOPInstanceUID = ENHANCED_CT_IMAGE_STORAGE, sop_uid
    ds.Modality, ds.SeriesInstanceUID, ds.SeriesNumber = "CT", series_uid, SERIES_NUMBER
    ds.SeriesDescription, ds.InstanceNumber = description, 1
    ds.PatientPosition = header.public.get("PatientPosition") or "HFS"
    ds.PositionReferenceIndicator = ""
    ds.Manufacturer = header.public["Manufacturer"]
    ds.ManufacturerModelName = header.public["ManufacturerModelName"]
    ds.DeviceSerialNumber = "REMOVED"
    ds.SoftwareVersions = provenance.algorithm_version
    # Of this instance, which was made now; nothing of the patient.
    ds.ContentDate, ds.ContentTime = time.strftime("%Y%m%d"), time.strftime("%H%M%S")
    ds.AcquisitionContextSequence = DicomSequence([])
    _add_pixel_description(ds, geometry, pixels)
    mark_compression(ds, header.public, provenance)
    ds.BurnedInAnnotation = "NO"  # the only value allowed; a source that has some is refused
    add_stack_dimension(ds, series_uid)
    ds.SharedFunctionalGroupsSequence = DicomSequence([_shared_groups(geometry, header, identity, provenance, pixels)])
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(
        [frame_groups(geometry, i) for i in range(geometry.shape_zyx[0])]
    )
    return ds


def add_stack_dimension(ds: Dataset, series_uid: str) -> None:
    """Multi-frame Dimension module (C.7.6.17): frames follow their position in the one stack."""
    dimension = derived_uid("dimension", series_uid)
    organization = Dataset()
    organization.DimensionOrganizationUID = dimension
    ds.DimensionOrganizationSequence = DicomSequence([organization])
    index = Dataset()
    index.DimensionOrganizationUID = dimension
    index.DimensionIndexPointer = Tag("InStackPositionNumber")
    index.FunctionalGroupPointer = Tag("FrameContentSequence")
    ds.DimensionIndexSequence = DicomSequence([index])


def _add_pixel_description(ds: Dataset, geometry: Geometry, pixels: PixelFormat) -> None:
    """Image Pixel, Enhanced CT Image and Common CT/MR Image Description modules (C.7.6.3, C.8.15.2, C.8.16.2)."""
    ds.ImageType = list(FRAME_TYPE)
    ds.PixelPresentation, ds.VolumetricProperties, ds.VolumeBasedCalculationTechnique = "MONOCHROME", "VOLUME", "NONE"
    ds.NumberOfFrames, ds.Rows, ds.Columns = geometry.shape_zyx
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(pixels.signed)
    ds.PresentationLUTShape = "IDENTITY"


FRAME_TYPE = ("DERIVED", "PRIMARY", "VOLUME", "RESAMPLED")


def _shared_groups(
    geometry: Geometry,
    header: SourceHeader,
    identity: SeriesIdentity,
    provenance: Provenance,
    pixels: PixelFormat,
) -> Dataset:
    """The macros that all frames share (C.7.6.16.2, C.8.15.3)."""
    anatomy = Dataset()
    code, meaning = REGIONS[str(header.public["BodyPartExamined"]).upper()]
    anatomy.FrameLaterality, anatomy.AnatomicRegionSequence = "U", coded(code, "SCT", meaning)
    frame_type = Dataset()
    frame_type.FrameType, frame_type.PixelPresentation = list(FRAME_TYPE), "MONOCHROME"
    frame_type.VolumetricProperties, frame_type.VolumeBasedCalculationTechnique = "VOLUME", "NONE"
    values = Dataset()
    values.RescaleIntercept, values.RescaleSlope = spell_number(pixels.intercept), spell_number(pixels.slope)
    values.RescaleType = "HU"
    window = Dataset()
    window.WindowCenter, window.WindowWidth = (spell_number(v) for v in provenance.window)
    groups = lattice_groups(geometry)
    groups.FrameAnatomySequence = DicomSequence([anatomy])
    groups.CTImageFrameTypeSequence = DicomSequence([frame_type])
    groups.PixelValueTransformationSequence = DicomSequence([values])
    groups.FrameVOILUTSequence = DicomSequence([window])
    groups.DerivationImageSequence = DicomSequence([derivation_item(identity, provenance)])
    event = Dataset()
    # The source's own event UID is not kept; a keyed one stands for it, the same for every series derived from it.
    event.IrradiationEventUID = derived_uid("irradiation-event", provenance.source_key)
    groups.IrradiationEventIdentificationSequence = DicomSequence([event])
    return groups


def lattice_groups(geometry: Geometry) -> Dataset:
    """Pixel Measures and Plane Orientation macros (C.7.6.16.2.1, C.7.6.16.2.4)."""
    dz, dy, dx = geometry.spacing_mm_zyx
    row_step, column_step = geometry.affine[:3, 2], geometry.affine[:3, 1]
    measures = Dataset()
    measures.PixelSpacing = [spell_number(dy), spell_number(dx)]
    measures.SliceThickness = spell_number(geometry.thickness_mm)
    measures.SpacingBetweenSlices = spell_number(dz)
    orientation = Dataset()
    orientation.ImageOrientationPatient = [spell_number(v) for v in (*(row_step / dx), *(column_step / dy))]
    groups = Dataset()
    groups.PixelMeasuresSequence = DicomSequence([measures])
    groups.PlaneOrientationSequence = DicomSequence([orientation])
    return groups


def derivation_item(identity: SeriesIdentity, provenance: Provenance) -> Dataset:
    """Derivation Image macro (C.7.6.16.2.6): every source slice that contributed."""
    item = Dataset()
    item.DerivationDescription = provenance.summary()
    item.DerivationCodeSequence = coded("113085", "DCM", "Spatial resampling")
    purpose = coded("121322", "DCM", "Source image for image processing operation")
    sources = []
    for uid in identity.source_sop_uids:
        source = Dataset()
        source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = identity.source_sop_class, uid
        source.PurposeOfReferenceCodeSequence = purpose
        sources.append(source)
    item.SourceImageSequence = DicomSequence(sources)
    return item


def evidence_item(header: SourceHeader, identity: SeriesIdentity, provenance: Provenance) -> Dataset:
    """The source slices by study and series (Source Image Evidence, C.8.15.2)."""
    series = Dataset()
    original = header.identity.get("SeriesInstanceUID") if identity.restored else None
    series.SeriesInstanceUID = str(original or derived_uid("source-series", provenance.source_key))
    slices = []
    for uid in identity.source_sop_uids:
        one = Dataset()
        one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID = identity.source_sop_class, uid
        slices.append(one)
    series.ReferencedSOPSequence = DicomSequence(slices)
    study = Dataset()
    study.StudyInstanceUID = identity.study_uid
    study.ReferencedSeriesSequence = DicomSequence([series])
    return study


def frame_groups(geometry: Geometry, index: int) -> Dataset:
    """Frame Content and Plane Position of one slice (C.7.6.16.2.2, C.7.6.16.2.3)."""
    content = Dataset()
    content.StackID, content.InStackPositionNumber, content.DimensionIndexValues = "1", index + 1, [index + 1]
    position = Dataset()
    position.ImagePositionPatient = [spell_number(v) for v in geometry.slice_position(index)]
    groups = Dataset()
    groups.FrameContentSequence = DicomSequence([content])
    groups.PlanePositionSequence = DicomSequence([position])
    return groups
