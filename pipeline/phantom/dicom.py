"""A phantom patient as an archive holds one: a zip of CT Image Storage files, ``1/`` thick and ``2/`` thin.

DICOM PS3.3 A.3 (CT Image IOD); explicit VR little endian; 12 bits stored with RescaleIntercept -1024, as scanners do.
Every name, id and UID is derived from the patient's label, so the same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from pipeline.volume import Volume

INTERCEPT = -1024
ZIP_TIME = (2020, 1, 1, 0, 0, 0)
IMPLEMENTATION_UID = UID("2.25.202011010000000000000000000000000000001")


def phantom_uid(*parts: object) -> UID:
    """A UID of the 2.25 root (PS3.5 B.2) made from a label; the same label gives the same UID."""
    digest = bytearray(hashlib.sha256("/".join(str(p) for p in ("ctpipe-phantom", *parts)).encode()).digest()[:16])
    digest[6] = digest[6] & 0x0F | 0x80  # RFC 9562, version 8: an application's own scheme
    digest[8] = digest[8] & 0x3F | 0x80
    return UID(f"2.25.{int.from_bytes(digest, 'big')}")


def patient_zip(thick: Volume, thin: Volume, label: str, comment: str = "") -> bytes:
    """The zip of one patient: folders ``1`` (thick) and ``2`` (thin), a deflated file per slice.

    ``label`` becomes PatientID and the seed of every UID, ``comment`` the zip's own comment. InstanceNumber runs from
    head to foot, against the slice normal, as most scanners count, and file names follow it.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.comment = comment.encode()
        for folder, series in (("1", thick), ("2", thin)):
            shared = _shared(label, int(folder), series)
            count = series.hu.shape[0]
            for instance in range(1, count + 1):
                data = _instance(shared, label, int(folder), instance, count - instance, series)
                info = zipfile.ZipInfo(f"{folder}/IM{instance:04d}.dcm", ZIP_TIME)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                archive.writestr(info, data, compresslevel=1)
    return buffer.getvalue()


FIXED: dict[str, Any] = {
    "SpecificCharacterSet": "ISO_IR 100",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "SOPClassUID": CTImageStorage,
    "StudyDate": "20200101",
    "SeriesDate": "20200101",
    "AcquisitionDate": "20200101",
    "ContentDate": "20200101",
    "StudyTime": "120000",
    "SeriesTime": "120000",
    "AcquisitionTime": "120000",
    "ContentTime": "120000",
    "AccessionNumber": "",
    "Modality": "CT",
    "Manufacturer": "ctpipe",
    "ManufacturerModelName": "phantom",
    "DeviceSerialNumber": "0",
    "SoftwareVersions": "1",
    "ReferringPhysicianName": "",
    "StudyDescription": "SYNTHETIC CHEST",
    "SyntheticData": "YES",
    "PatientBirthDate": "",
    "PatientSex": "O",
    "PatientPosition": "HFS",
    "BodyPartExamined": "CHEST",
    "ContrastBolusAgent": "NONE REAL",
    "ScanOptions": "HELICAL MODE",
    "KVP": "120",
    "XRayTubeCurrent": "200",
    "ExposureTime": "500",
    "ConvolutionKernel": "PHANTOM-SOFT",
    "GantryDetectorTilt": "0",
    "StudyID": "1",
    "AcquisitionNumber": 1,
    "PositionReferenceIndicator": "",
    "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 12,
    "HighBit": 11,
    "PixelRepresentation": 0,
    "BurnedInAnnotation": "NO",
    "RescaleIntercept": str(INTERCEPT),
    "RescaleSlope": "1",
    "RescaleType": "HU",
    "WindowCenter": "40",
    "WindowWidth": "400",
}
"""Attributes that every phantom's slices have in common."""


def _shared(label: str, number: int, series: Volume) -> Dataset:
    """The attributes that all slices of one series share."""
    dz, dy, dx = series.geometry.spacing_mm_zyx
    values: dict[str, Any] = FIXED | {
        "SeriesDescription": f"SYNTHETIC {dz:g} mm",
        "PatientName": f"PHANTOM^{label.replace('_', ' ').upper()}",
        "PatientID": f"PHANTOM-{label.upper()}",
        "SliceThickness": _decimal(series.geometry.thickness_mm),
        "ReconstructionDiameter": _decimal(dx * series.hu.shape[2]),
        "StudyInstanceUID": phantom_uid(label),
        "SeriesInstanceUID": phantom_uid(label, number),
        "FrameOfReferenceUID": phantom_uid(label, "frame"),
        "SeriesNumber": number,
        "PixelSpacing": [_decimal(dy), _decimal(dx)],
        "Rows": series.hu.shape[1],
        "Columns": series.hu.shape[2],
    }
    dataset = Dataset()
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


def _instance(shared: Dataset, label: str, number: int, instance: int, index: int, series: Volume) -> bytes:
    """One slice as a DICOM file."""
    uid = phantom_uid(label, number, instance)
    shared.SOPInstanceUID = uid
    shared.InstanceNumber = instance
    shared.ImagePositionPatient = [_decimal(v) for v in series.geometry.slice_position(index)]
    shared.SliceLocation = _decimal(series.geometry.z_mm[index])
    stored = series.hu[index].astype(np.int32) - INTERCEPT
    shared.PixelData = np.ascontiguousarray(stored, dtype="<u2").tobytes()
    shared["PixelData"].VR = "OW"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = uid
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = IMPLEMENTATION_UID
    meta.ImplementationVersionName = "CTPIPE_PHANTOM"
    shared.file_meta = meta
    out = io.BytesIO()
    shared.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _decimal(value: float) -> str:
    """A decimal string of at most 16 characters (PS3.5 6.2), without a negative zero."""
    text = f"{round(value, 6) + 0.0:.6f}".rstrip("0").rstrip(".")
    return text or "0"
