"""A map of standard deviations as one Parametric Map Storage instance (DICOM PS3.3 A.75): 32-bit floats, in HU."""

from __future__ import annotations

import time
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
FRAME_TYPE = ("DERIVED", "PRIMARY", "VOLUME", "STD_DEVIATION")


def write_parametric_map(
    spread_hu: NDArray[np.float32],
    geometry: Geometry,
    header: SourceHeader,
    out_dir: Path,
    *,
    uids: SeriesIdentity,
    provenance: Provenance,
) -> WrittenSeries:
    """Write the standard deviation over samples, (z, y, x) float32 HU, as one file in a new folder, whole or absent.

    Raises:
        InputError: ``out_dir`` exists, or the pixels exceed 4 GiB.
    """
    values = np.ascontiguousarray(spread_hu, dtype="<f4")
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
    ds = multi_frame_dataset(identity, provenance)
    ds.SOPClassUID, ds.SOPInstanceUID = PARAMETRIC_MAP_STORAGE, sop_uid
    ds.Modality, ds.SeriesInstanceUID, ds.SeriesNumber = "CT", series_uid, UNCERTAINTY_SERIES_NUMBER
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
    ds.ContentLabel, ds.ContentDescription, ds.ContentCreatorName = "UNCERTAINTY", described(provenance)[0], ""
    ds.ContentQualification, ds.RecognizableVisualFeatures = "RESEARCH", "YES"
    ds.AcquisitionContextSequence = DicomSequence([])
    ds.ImageType = list(FRAME_TYPE)
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
    frame_type.FrameType = list(FRAME_TYPE)
    groups.ParametricMapFrameTypeSequence = DicomSequence([frame_type])
    identity_values = Dataset()
    identity_values.RescaleIntercept, identity_values.RescaleSlope, identity_values.RescaleType = "0", "1", "US"
    groups.PixelValueTransformationSequence = DicomSequence([identity_values])
    window = Dataset()
    window.WindowCenter, window.WindowWidth = "25", "50"
    groups.FrameVOILUTSequence = DicomSequence([window])
    groups.DerivationImageSequence = DicomSequence([derivation_item(identity, provenance)])
    groups.RealWorldValueMappingSequence = DicomSequence([_mapping(largest)])
    ds.SharedFunctionalGroupsSequence = DicomSequence([groups])
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(
        [frame_groups(geometry, i) for i in range(geometry.shape_zyx[0])]
    )
    return ds


def _mapping(largest: float) -> Dataset:
    """Real World Value Mapping (C.7.6.16.2.11): a stored value is a standard deviation in HU."""
    item = Dataset()
    item.LUTExplanation, item.LUTLabel = "standard deviation over samples in HU", "SD"
    item.DoubleFloatRealWorldValueFirstValueMapped = 0.0
    item.DoubleFloatRealWorldValueLastValueMapped = largest
    item.RealWorldValueIntercept, item.RealWorldValueSlope = 0.0, 1.0
    item.MeasurementUnitsCodeSequence = coded("[hnsf'U]", "UCUM", "Hounsfield unit")
    return item
