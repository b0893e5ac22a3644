"""Small made studies in an archive's layout, for tests of ingest: genuine DICOM files, 16 x 16 pixels."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

SIZE = 16
Edit = Callable[[Dataset], None]


@dataclass(frozen=True)
class Scan:
    """One reconstruction: ``n`` slices ``spacing`` mm apart from ``z0`` on."""

    uid: str
    n: int = 4
    spacing: float = 5.0
    z0: float = 0.0
    thickness: float | None = None
    kernel: str = "B30f"
    frame: str = "1.2.9"
    acquisition: int = 1
    origin: tuple[float, float] = (-8.0, -8.0)
    pixel: float = 1.0
    seed: int = 0
    study: str = "1.2.3"
    patient: str = "PAT1"
    edit: Edit = field(default=lambda ds: None)
    image: NDArray[np.int16] | None = None

    def files(self) -> list[bytes]:
        return [self.file(i) for i in range(self.n)]

    def file(self, i: int) -> bytes:
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = f"{self.uid}.{i + 1}"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Modality, ds.Manufacturer = "CT", "SIEMENS"
        ds.PatientID, ds.PatientName = self.patient, f"Name^{self.patient}"
        ds.PatientBirthDate, ds.PatientSex = "", ""
        ds.StudyInstanceUID, ds.SeriesInstanceUID = self.study, self.uid
        ds.FrameOfReferenceUID, ds.AcquisitionNumber = self.frame, self.acquisition
        ds.ConvolutionKernel, ds.KVP = self.kernel, "120"
        ds.SliceThickness = str(self.thickness if self.thickness is not None else self.spacing)
        ds.ImagePositionPatient = [*self.origin, self.z0 + i * self.spacing]
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing = [self.pixel, self.pixel]
        ds.InstanceNumber = i + 1
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleIntercept, ds.RescaleSlope = "0", "1"
        pixels = self.image[i] if self.image is not None else self._pixels(i)
        ds.Rows, ds.Columns = pixels.shape
        ds.PixelData = pixels.astype("<i2").tobytes()
        self.edit(ds)
        out = io.BytesIO()
        ds.save_as(out, enforce_file_format=True)
        return out.getvalue()

    def _pixels(self, i: int) -> NDArray[np.int16]:
        rng = np.random.default_rng([self.seed, i])
        return rng.integers(-100, 200, (SIZE, SIZE)).astype(np.int16)


def thick(uid: str = "1.2.3.5", **changes: object) -> Scan:
    return Scan(uid, **{"n": 4, "spacing": 5.0, "z0": 2.0, **changes})  # type: ignore[arg-type]


def thin(uid: str = "1.2.3.1", **changes: object) -> Scan:
    return Scan(uid, **{"n": 20, "spacing": 1.0, "z0": 0.0, **changes})  # type: ignore[arg-type]


def study(patient: str, number: int) -> list[Scan]:
    """A thick and a thin series of one patient, UIDs made from ``number``."""
    ids = {"study": f"1.2.{number}", "patient": patient, "frame": f"1.9.{number}", "seed": number}
    return [thick(f"1.2.{number}.5", **ids), thin(f"1.2.{number}.1", **ids)]


def write_zip(path: Path, scans: Iterable[Scan], extra: Iterable[tuple[str, bytes]] = ()) -> Path:
    """A zip with one numbered folder a series."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, scan in enumerate(scans, start=1):
            for i, data in enumerate(scan.files()):
                archive.writestr(f"{number}/I{i:03d}", data)
        for name, data in extra:
            archive.writestr(name, data)
    return path
