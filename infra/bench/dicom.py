"""HU volume to a DICOM series on disk, 300 x 512 x 512, two threads, files synced: ctpipe beside pydicom, in one run.

    python infra/bench/dicom.py [--quick] [--repeat 3] [--slices 300]

Every writer runs in a process of its own; imports are not counted, the fastest of the repeats is. The peer builds a
dataset a slice and saves it with pydicom, as the tutorials do, without syncing. Peak memory is the process's, the
volume itself (2 bytes a voxel) and all imports included. Prints a table, then one JSON object, which is also kept in
infra/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.writing import FileOptions

WRITERS = ("explicit", "jpegls", "htj2k", "pydicom")
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 slices, 2 repeats: under 60 s on 2 cores")
    parser.add_argument("--slices", type=int, default=300)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", choices=WRITERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.slices, options.repeat = 60, 2
    if options.child:
        print(json.dumps(measure(options.child, options.slices, options.repeat)))
        return
    measured = {}
    for name in WRITERS:
        command = [sys.executable, __file__, "--child", name, "--slices", str(options.slices)]
        done = subprocess.run([*command, "--repeat", str(options.repeat)], capture_output=True, text=True, check=True)
        measured[name] = json.loads(done.stdout.splitlines()[-1])
    report(measured, options.slices, quick=options.quick)


def anatomy(slices: int, size: int = 512) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Air, a body with organs, and noise of 12 HU: what a lossless coder meets in a chest."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    body = np.where(x**2 / 0.16 + y**2 / 0.1 < 1, 40.0, -1000.0)
    body += np.where((np.abs(x) - 0.17) ** 2 / 0.012 + y**2 / 0.03 < 1, -880.0, 0.0)
    noise = rng.normal(0, 12, (8, size, size)).astype(np.float32)
    hu = np.empty((slices, size, size), np.int16)
    for i in range(slices):
        hu[i] = np.clip(np.rint(body + np.roll(noise[i % 8], i, axis=1)), -1024, 3071)
    return hu


def _peak_mib() -> float:
    """The high water mark of this process; ru_maxrss would carry over the parent's through exec."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def measure(writer: str, slices: int, repeat: int) -> dict[str, float]:
    """Fastest seconds, peak MiB and MiB on disk of one writer."""
    hu = anatomy(slices)
    seconds, written = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(repeat):
            out = Path(scratch) / str(number)
            write = with_pydicom if writer == "pydicom" else with_ctpipe
            seconds.append(write(hu, out, writer))
            written = sum(file.stat().st_size for file in out.iterdir())
            shutil.rmtree(out)
    peak = _peak_mib()
    return {"seconds": min(seconds), "peak_mib": peak, "written_mib": written / 2**20}


def with_ctpipe(hu: np.ndarray[Any, np.dtype[np.int16]], out: Path, syntax: str) -> float:
    import imagecodecs  # noqa: F401 - not part of the time

    from pipeline.volume import Geometry, SourceHeader
    from pipeline.writing import Provenance, SeriesIdentity, write_ct_series

    affine = ((0.0, 0.0, 0.7, -179.2), (0.0, 0.7, 0.0, -179.2), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    at = Geometry((len(hu), *hu.shape[1:]), affine, tuple(map(float, range(len(hu)))), 5.0)  # type: ignore[arg-type]
    keys = {"patient_key": "a" * 16, "study_key": "b" * 16, "frame_key": "c" * 16, "source_key": "d" * 16}
    who = SeriesIdentity.pseudonymous(**keys, source_slices=len(hu) // 5)
    made = Provenance("generated", "d" * 16, (40.0, 400.0), 1.0)
    start = time.perf_counter()
    write_ct_series(
        hu, at, SourceHeader(), out, uids=who, provenance=made, files=FileOptions(transfer_syntax=syntax, threads=2)
    )
    return time.perf_counter() - start


def with_pydicom(hu: np.ndarray[Any, np.dtype[np.int16]], out: Path, _: str) -> float:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    out.mkdir()
    start = time.perf_counter()
    study, series = generate_uid(), generate_uid()
    for i, image in enumerate(hu):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality, ds.InstanceNumber = study, series, "CT", i + 1
        ds.ImagePositionPatient, ds.ImageOrientationPatient = [-179.2, -179.2, float(i)], [1, 0, 0, 0, 1, 0]
        ds.PixelSpacing, ds.SliceThickness = [0.7, 0.7], 5.0
        ds.Rows, ds.Columns = image.shape
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.RescaleIntercept, ds.RescaleSlope = 0, 1
        ds.PixelData = image.tobytes()
        ds.save_as(out / f"{i:05d}.dcm", enforce_file_format=True)
    return time.perf_counter() - start


def report(measured: dict[str, dict[str, float]], slices: int, *, quick: bool) -> None:
    print(f"{slices} x 512 x 512 to DICOM on {platform.machine()}, 2 threads")
    print(f"{'writer':28s} {'seconds':>8s} {'peak MiB':>9s} {'on disk':>9s}")
    for name, row in measured.items():
        label = "pydicom loop (not synced)" if name == "pydicom" else f"ctpipe {name}"
        print(f"{label:28s} {row['seconds']:8.2f} {row['peak_mib']:9.0f} {row['written_mib']:5.0f} MiB")
    result = {
        "bench": "dicom",
        "device": f"cpu-{platform.machine()}",
        "quick": quick,
        "slices": slices,
        "write_300_s": measured["explicit"]["seconds"] * 300 / slices,
        "write_300_jpegls_s": measured["jpegls"]["seconds"] * 300 / slices,
        "write_300_htj2k_s": measured["htj2k"]["seconds"] * 300 / slices,
        "peak_mib": measured["explicit"]["peak_mib"],
        "peak_jpegls_mib": measured["jpegls"]["peak_mib"],
        "vs_pydicom": measured["pydicom"]["seconds"] / measured["explicit"]["seconds"],
        "versions": {name: version(name) for name in ("pydicom", "imagecodecs", "numpy")},
        "writers": measured,
    }
    line = json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()})
    RESULTS.mkdir(exist_ok=True)
    name = f"dicom-cpu-{platform.machine()}{'-quick' if quick else ''}.json"
    (RESULTS / name).write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
