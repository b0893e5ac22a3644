"""Made DICOM CT for tests and benchmarks: series in any supported transfer syntax, with any deviation on request."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, generate_uid

CT = "1.2.840.10008.5.1.4.1.1.2"
IMPLICIT, EXPLICIT, BIG, DEFLATED = (
    "1.2.840.10008.1.2",
    "1.2.840.10008.1.2.1",
    "1.2.840.10008.1.2.2",
    "1.2.840.10008.1.2.1.99",
)
RLE, JPEG8, JPEG12, JPEG14, SV1 = (
    "1.2.840.10008.1.2.5",
    "1.2.840.10008.1.2.4.50",
    "1.2.840.10008.1.2.4.51",
    "1.2.840.10008.1.2.4.57",
    "1.2.840.10008.1.2.4.70",
)
JPEGLS, JPEGLS_NEAR, J2K, J2K_LOSSY, HTJ2K, HTJ2K_RPCL = (
    "1.2.840.10008.1.2.4.80",
    "1.2.840.10008.1.2.4.81",
    "1.2.840.10008.1.2.4.90",
    "1.2.840.10008.1.2.4.91",
    "1.2.840.10008.1.2.4.201",
    "1.2.840.10008.1.2.4.202",
)
LOSSLESS = (IMPLICIT, EXPLICIT, BIG, DEFLATED, RLE, JPEG14, SV1, JPEGLS, J2K, HTJ2K, HTJ2K_RPCL)

Tweak = Callable[[Dataset, int], None]


def anatomy(count: int = 8, size: int = 32, seed: int = 0) -> NDArray[np.uint16]:
    """Stored values (slices, rows, columns), 12 bits unsigned, of a noisy disc in air."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - size / 2 + 0.5
    disc = np.where(np.hypot(y, x) < size * 0.4, 1060.0, 24.0)
    drift = np.linspace(0, 40, count)[:, None, None]
    return (disc + drift + rng.normal(0, 8, (count, size, size))).clip(0, 4095).round().astype(np.uint16)


def dataset(
    stored: NDArray[Any],
    *,
    position: Sequence[float] = (0.0, 0.0, 0.0),
    study: str = "1.2.826.0.1.3680043.8.498.1",
    series: str = "1.2.826.0.1.3680043.8.498.2",
    frame: str = "1.2.826.0.1.3680043.8.498.3",
    number: int = 1,
    thickness: float = 5.0,
    bits: int = 12,
) -> Dataset:
    """One CT image without pixel data."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CT, generate_uid(entropy_srcs=[series, str(number), str(position)])
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.StudyDate, ds.StudyTime, ds.Modality, ds.Manufacturer = "20240102", "030405", "CT", "SIEMENS"
    ds.ManufacturerModelName = "SOMATOM Force"
    ds.PatientName, ds.PatientID = "DOE^JOHN", "ID-4711"
    ds.PatientBirthDate, ds.PatientSex = "19700101", "M"
    ds.SliceThickness, ds.KVP, ds.ConvolutionKernel, ds.PatientPosition = thickness, 120, "Br38f", "HFS"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
    ds.SeriesNumber, ds.AcquisitionNumber, ds.InstanceNumber = 2, 1, number
    ds.ImagePositionPatient = [float(v) for v in position]
    ds.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = stored.shape[-2:]
    ds.PixelSpacing = [0.7, 0.7]
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = stored.dtype.itemsize * 8, bits, bits - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    return ds


def compress(stored: NDArray[Any], syntax: str, bits: int = 12) -> bytes:
    """One frame as an encapsulated stream. Signed values go in as their two's complement, as scanners write them."""
    cells = np.ascontiguousarray(stored)
    if cells.dtype.kind == "i" and syntax not in (J2K, J2K_LOSSY, RLE):
        cells = cells.view(np.uint16 if cells.itemsize == 2 else np.uint8)
        if syntax in (SV1, JPEG14):
            cells = cells & ((1 << bits) - 1)
    if syntax == RLE:
        return rle(cells)
    if syntax in (SV1, JPEG14):
        predictor = 1 if syntax == SV1 else 6
        return bytes(imagecodecs.jpeg8_encode(cells, lossless=True, predictor=predictor, bitspersample=bits))
    if syntax in (JPEG8, JPEG12):
        return bytes(imagecodecs.jpeg8_encode(cells, level=95, bitspersample=8 if syntax == JPEG8 else 12))
    if syntax in (JPEGLS, JPEGLS_NEAR):
        return bytes(imagecodecs.jpegls_encode(cells, level=2 if syntax == JPEGLS_NEAR else 0))
    if syntax in (J2K, J2K_LOSSY):
        return bytes(imagecodecs.jpeg2k_encode(cells, level=0, reversible=True, codecformat="j2k", bitspersample=bits))
    return bytes(imagecodecs.htj2k_encode(cells, reversible=True))


def rle(cells: NDArray[Any]) -> bytes:
    """PackBits segments, most significant byte first (PS3.5 annex G)."""
    big = cells.astype(cells.dtype.newbyteorder(">")).view(np.uint8).reshape(-1, cells.itemsize)
    segments = []
    for plane in range(cells.itemsize):
        packed = b"".join(
            bytes(imagecodecs.packbits_encode(row.tobytes())) for row in big[:, plane].reshape(cells.shape)
        )
        segments.append(packed + b"\0" * (len(packed) % 2))
    header, offset = [len(segments)], 64
    for segment in segments:
        header.append(offset)
        offset += len(segment)
    return np.array(header + [0] * (16 - len(header)), "<u4").tobytes() + b"".join(segments)


def file_bytes(ds: Dataset, stored: NDArray[Any] | None, syntax: str = EXPLICIT, *, preamble: bool = True) -> bytes:
    """A DICOM file; ``stored`` (rows, columns), or (frames, rows, columns), goes in as the syntax asks."""
    if stored is not None:
        frames = stored if stored.ndim == 3 else stored[None]
        if UID(syntax).is_encapsulated:
            ds.PixelData = encapsulate([compress(one, syntax, ds.BitsStored) for one in frames])
            ds["PixelData"].VR = "OB"
        else:
            order = ">" if syntax == BIG else "<"
            raw = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
            ds.PixelData = raw + b"\0" * (len(raw) % 2)
            ds["PixelData"].VR = "OW" if ds.BitsAllocated == 16 or syntax == IMPLICIT else "OB"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID, meta.ImplementationClassUID = UID(syntax), "1.2.3.4"
    buffer = io.BytesIO()
    if not preamble:
        dcmwrite(buffer, ds, implicit_vr=syntax == IMPLICIT, little_endian=syntax != BIG, force_encoding=True)
        return buffer.getvalue()
    ds.file_meta = meta
    ds.preamble = b"\0" * 128
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def series_files(
    stored: NDArray[Any] | None = None,
    *,
    z: Iterable[float] | None = None,
    syntax: str = EXPLICIT,
    tweak: Tweak | None = None,
    **header: Any,
) -> list[bytes]:
    """A series, one file a slice, at positions ``z`` (5 mm apart from 0 by default)."""
    stored = anatomy() if stored is None else stored
    positions = list(z) if z is not None else [5.0 * k for k in range(len(stored))]
    files = []
    for index, (one, where) in enumerate(zip(stored, positions, strict=True)):
        ds = dataset(one, position=(-10.0, -20.0, where), number=index + 1, **header)
        if tweak is not None:
            tweak(ds, index)
        files.append(file_bytes(ds, one, syntax))
    return files


def zip_of(path: Path, files: Iterable[bytes] | dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Pack files into a zip at ``path``; unnamed ones become 2/I0001, 2/I0002, ..."""
    named = files if isinstance(files, dict) else {f"2/I{i:04d}": data for i, data in enumerate(files, 1)}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in named.items():
            archive.writestr(name, data)
    return path


def enhanced(stored: NDArray[Any], z: Sequence[float], syntax: str = EXPLICIT) -> bytes:
    """One enhanced multi-frame CT file whose frames lie at ``z``, in whatever order that is."""
    ds = dataset(stored, number=1)
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(ds, keyword)
    for keyword in ("RescaleIntercept", "RescaleSlope", "RescaleType"):
        delattr(ds, keyword)
    ds.NumberOfFrames = len(stored)
    shared, orientation, measures, transform = Dataset(), Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    measures.PixelSpacing, measures.SliceThickness = [0.7, 0.7], 5.0
    transform.RescaleIntercept, transform.RescaleSlope, transform.RescaleType = -1024, 1, "HU"
    shared.PlaneOrientationSequence = [orientation]
    shared.PixelMeasuresSequence = [measures]
    shared.PixelValueTransformationSequence = [transform]
    ds.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for where in z:
        group, place = Dataset(), Dataset()
        place.ImagePositionPatient = [-10.0, -20.0, float(where)]
        group.PlanePositionSequence = [place]
        groups.append(group)
    ds.PerFrameFunctionalGroupsSequence = groups
    return file_bytes(ds, stored, syntax)
