"""A map as one Parametric Map Storage instance (DICOM PS3.3 A.75), 32-bit floats: standard deviations or the alarm."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian

from latentcache import InputError
from latentcache.storage import atomic_folder, refuse_existing, sync_file
from pipeline.volume import Geometry, SourceHeader
from pipeline.writing.ct_image import UNCERTAINTY_SERIES_NUMBER, WrittenSeries, series_digest
from pipeline.writing.dataset import UNPAIRED_BODY_PARTS, SharedHeader, described, file_prefix, multi_frame_dataset
from pipeline.writing.enhanced_ct import (
    FILE_NAME,
    LARGEST_PIXEL_DATA,
    add_stack_dimension,
    derivation_item,
    evidence_item,
    frame_groups,
    lattice_groups,
)
from pipeline.writing.provenance import ALGORITHM, Provenance, coded, mark_compression
from pipeline.writing.series_identity import SeriesIdentity, derived_uid

PARAMETRIC_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.30"
ALARM_SERIES_NUMBER = 9003


@dataclass(frozen=True)
class Quantity:
    """Meaning of a map's values, in DICOM's terms.

    Attributes:
        contrast: Value 4 of Image Type (PS3.3 C.8.16.1.4).
        content_label, label: Of the content and of the real world value mapping.
        unit: A UCUM code and its meaning.
        window: Centre and width that a viewer opens it with.
    """

    series_number: int
    contrast: str
    content_label: str
    label: str
    explanation: str
    unit: tuple[str, str]
    window: tuple[str, str]

    @property
    def frame_type(self) -> list[str]:
        return ["DERIVED", "PRIMARY", "VOLUME", self.contrast]


SPREAD = Quantity(
    UNCERTAINTY_SERIES_NUMBER, "STD_DEVIATION", "UNCERTAINTY", "SD", "standard deviation over samples in HU",
    ("[hnsf'U]", "Hounsfield unit"), ("25", "50"),
)  # fmt: skip
ALARM = Quantity(
    ALARM_SERIES_NUMBER, "QUANTITY", "ALARM", "ALARM", "how far a sample stands out from the others, in their spread",
    ("1", "no units"), ("3", "6"),
)  # fmt: skip


def write_parametric_map(
    values: NDArray[np.float32],
    geometry: Geometry,
    header: SourceHeader,
    out_dir: Path,
    *,
    uids: SeriesIdentity,
    provenance: Provenance,
) -> WrittenSeries:
    """Write a map (z, y, x) float32 as one file in a new folder, whole or absent.

    The provenance's kind says what it is: ``uncertainty`` in HU, or ``alarm`` without a unit.

    Raises:
        InputError: ``out_dir`` exists, or the pixels exceed 4 GiB.
    """
    values = np.ascontiguousarray(values, dtype="<f4")
    if values.shape != geometry.shape_zyx:
        raise AssertionError(f"{values.shape} does not fit {geometry.shape_zyx}")
    refuse_existing(out_dir)
    if values.nbytes > LARGEST_PIXEL_DATA:
        raise InputError(
            f"{values.nbytes / 2**30:.1f} GiB of pixels in one instance",
            expected="4 GiB at most",
            remedy="Write the uncertainty as a CT series instead.",
        )
    digest = series_digest(values.view(np.int16), geometry, uids, provenance)
    series_uid, sop_uid = derived_uid("map-series", digest), derived_uid("map-instance", digest)
    ds = _dataset(geometry, header, uids, provenance, series_uid, sop_uid, float(values.max()))
    with atomic_folder(out_dir) as partial:
        with (partial / FILE_NAME).open("wb") as file:
            file.write(file_prefix(ExplicitVRLittleEndian, sop_uid, PARAMETRIC_MAP_STORAGE))
            file.write(SharedHeader(ds, ()).weave({}))
            # Float Pixel Data (7FE0,0008), VR OF (C.7.6.24).
            file.write(b"\xe0\x7f\x08\x00OF\x00\x00" + values.nbytes.to_bytes(4, "little"))
            file.write(values.data.cast("B"))
        sync_file(partial / FILE_NAME)
    return WrittenSeries((out_dir / FILE_NAME,), series_uid, uids.study_uid, (sop_uid,))


def _dataset(
    geometry: Geometry,
    header: SourceHeader,
    identity: SeriesIdentity,
    provenance: Provenance,
    series_uid: str,
    sop_uid: str,
    largest: float,
) -> Dataset:
    """Everything but the pixels. The map is ctpipe's own product, so the equipment named is ctpipe."""
    quantity = ALARM if provenance.kind == "alarm" else SPREAD
    ds = multi_frame_dataset(identity, provenance)
    ds.SOPClassUID, ds.SOPInstanceUID = PARAMETRIC_MAP_STORAGE, sop_uid
    ds.Modality, ds.SeriesInstanceUID, ds.SeriesNumber = "CT", series_uid, quantity.series_number
    ds.SeriesDescription, ds.InstanceNumber = described(provenance)[0], 1
    ds.PositionReferenceIndicator = ""
    part = str(header.public.get("BodyPartExamined", ""))
    if part:
        ds.BodyPartExamined = part
    if part not in UNPAIRED_BODY_PARTS:
        ds.Laterality = ""  # type 2C (C.7.3.1): empty means unknown
    ds.Manufacturer, ds.ManufacturerModelName, ds.DeviceSerialNumber = ALGORITHM, ALGORITHM, "NONE"
    ds.SoftwareVersions = provenance.algorithm_version
    ds.ContentDate, ds.ContentTime = time.strftime("%Y%m%d"), time.strftime("%H%M%S")
    ds.ContentLabel, ds.ContentDescription, ds.ContentCreatorName = quantity.content_label, described(provenance)[0], ""
    ds.ContentQualification, ds.RecognizableVisualFeatures = "RESEARCH", "YES"
    ds.AcquisitionContextSequence = DicomSequence([])
    ds.ImageType = quantity.frame_type
    ds.NumberOfFrames, ds.Rows, ds.Columns = geometry.shape_zyx
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.BitsAllocated = 1, "MONOCHROME2", 32
    ds.PresentationLUTShape, ds.BurnedInAnnotation = "IDENTITY", "NO"
    mark_compression(ds, header.public, provenance)
    add_stack_dimension(ds, series_uid)
    ds.ReferencedSeriesSequence = evidence_item(header, identity, provenance).ReferencedSeriesSequence
    for item in ds.ReferencedSeriesSequence:
        item.ReferencedInstanceSequence = item.ReferencedSOPSequence
        del item.ReferencedSOPSequence
    groups = lattice_groups(geometry)
    frame_type = Dataset()
    frame_type.FrameType = quantity.frame_type
    groups.ParametricMapFrameTypeSequence = DicomSequence([frame_type])
    identity_values = Dataset()
    identity_values.RescaleIntercept, identity_values.RescaleSlope, identity_values.RescaleType = "0", "1", "US"
    groups.PixelValueTransformationSequence = DicomSequence([identity_values])
    window = Dataset()
    window.WindowCenter, window.WindowWidth = quantity.window
    groups.FrameVOILUTSequence = DicomSequence([window])
    groups.DerivationImageSequence = DicomSequence([derivation_item(identity, provenance)])
    groups.RealWorldValueMappingSequence = DicomSequence([_mapping(largest, quantity)])
    ds.SharedFunctionalGroupsSequence = DicomSequence([groups])
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(
        [frame_groups(geometry, i) for i in range(geometry.shape_zyx[0])]
    )
    return ds


def _mapping(largest: float, quantity: Quantity) -> Dataset:
    """Real World Value Mapping (C.7.6.16.2.11): a stored value is the quantity itself."""
    item = Dataset()
    item.LUTExplanation, item.LUTLabel = quantity.explanation, quantity.label
    item.DoubleFloatRealWorldValueFirstValueMapped = 0.0
    item.DoubleFloatRealWorldValueLastValueMapped = largest
    item.RealWorldValueIntercept, item.RealWorldValueSlope = 0.0, 1.0
    item.MeasurementUnitsCodeSequence = coded(quantity.unit[0], "UCUM", quantity.unit[1])
    return item
