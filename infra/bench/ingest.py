"""Zip to HU volume, 306 x 512 x 512, two threads, warm cache: ctpipe beside dcm2niix and SimpleITK in one run.

    python infra/bench/ingest.py [--quick] [--repeat 3] [--slices 306]

Every reader runs in a process of its own; imports are not counted, the fastest of the repeats is. The peers cannot read
zips, so unpacking to a scratch folder is part of their time, as it is part of their use. Prints a table, then one JSON
object, which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

READERS = ("ctpipe", "ctpipe, one thread", "dcm2niix", "SimpleITK")
SYNTAXES = {"evle": "1.2.840.10008.1.2.1", "jpll": "1.2.840.10008.1.2.4.70"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="64 slices, 2 repeats: under 60 s on 2 cores")
    parser.add_argument("--slices", type=int, default=306)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("READER", "ZIP", "REPEAT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_measure(options.child[0], Path(options.child[1]), int(options.child[2]))))
        return
    if options.quick:
        options.slices, options.repeat = 64, 2
    with tempfile.TemporaryDirectory() as scratch:
        measured = {}
        for name, syntax in SYNTAXES.items():
            archive = _make_zip(Path(scratch) / f"{name}.zip", options.slices, syntax)
            for reader in READERS:
                measured[name, reader] = _run_child(reader, archive, options.repeat)
    _report(measured, options.slices, quick=options.quick)


def _make_zip(path: Path, slices: int, syntax: str) -> Path:
    from tests.support.dicom_files import anatomy, dataset, file_bytes

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for k in range(slices):
            stored = anatomy(1, 512, seed=k)[0]
            ds = dataset(stored, position=(-10.0, -20.0, float(k)), number=k + 1, thickness=1.0)
            archive.writestr(f"2/I{k:04d}", file_bytes(ds, stored, syntax))
    return path


def _run_child(reader: str, archive: Path, repeat: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", reader, str(archive), str(repeat)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "2"}
    answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(answer.splitlines()[-1])
    return found


def _measure(reader: str, archive: Path, repeat: int) -> dict[str, float]:
    read = {"dcm2niix": _dcm2niix, "SimpleITK": _simpleitk}.get(reader) or _ctpipe(1 if "one" in reader else 2)
    archive.read_bytes()
    imported = _resident_mib()
    seconds, checksum = float("inf"), 0.0
    for _ in range(repeat):
        started = time.perf_counter()
        volume = read(archive)
        seconds = min(seconds, time.perf_counter() - started)
        checksum, size = float(volume[:, ::37, ::41].mean()), volume.nbytes / 2**20
        del volume
    peak = _peak_mib()
    return {"seconds": seconds, "checksum": checksum, "imported_mib": imported, "peak_mib": peak, "volume_mib": size}


def _peak_mib() -> float:
    """The high water mark of this process; ru_maxrss would carry over the parent's through exec."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _ctpipe(threads: int):  # type: ignore[no-untyped-def]
    from pipeline.archive import open_archive
    from pipeline.reading import read_scanned, scan

    def read(archive: Path):  # type: ignore[no-untyped-def]
        source = open_archive(archive)
        try:
            (one,) = scan(source, keep_instances=True).series
            return read_scanned(source, one, threads=threads).hu
        finally:
            source.close()

    return read


def _unpacked(archive: Path) -> str:
    folder = tempfile.mkdtemp()
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


def _dcm2niix(archive: Path):  # type: ignore[no-untyped-def]
    import nibabel
    import numpy as np

    folder = _unpacked(archive)
    try:
        tool = Path(sys.executable).parent / "dcm2niix"
        command = [str(tool), "-z", "n", "-b", "n", "-m", "n", "-f", "out", "-o", folder, folder]
        subprocess.run(command, check=True, capture_output=True)
        (found,) = [p for p in Path(folder).glob("out*.nii") if "Eq" not in p.name]
        # NIfTI rows run the other way.
        return np.asarray(nibabel.load(found).dataobj).T[:, ::-1]
    finally:
        shutil.rmtree(folder)


def _simpleitk(archive: Path):  # type: ignore[no-untyped-def]
    import SimpleITK

    folder = _unpacked(archive)
    try:
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(folder + "/2"))
        return SimpleITK.GetArrayFromImage(reader.Execute())
    finally:
        shutil.rmtree(folder)


def _report(measured: dict[tuple[str, str], dict[str, float]], slices: int, *, quick: bool) -> None:
    print(f"zip -> HU, {slices} x 512 x 512; seconds (fastest), peak MiB of the reader's own process")
    for name in SYNTAXES:
        for reader in READERS:
            one = measured[name, reader]
            print(f"  {name}  {reader:20} {one['seconds']:7.3f} s  {one['peak_mib']:7.0f} MiB")
    reference = measured["evle", "ctpipe"]["checksum"]
    strays = [key for key, one in measured.items() if abs(one["checksum"] - reference) > 1e-3]
    if strays:
        raise SystemExit(f"the readers disagree about the volume: {strays}")

    def ratio(name: str, peer: str) -> float:
        return round(measured[name, peer]["seconds"] / measured[name, "ctpipe"]["seconds"], 2)

    ours = measured["evle", "ctpipe"]
    result = {
        "bench": "ingest",
        "evle_vs_dcm2niix": ratio("evle", "dcm2niix"),
        "evle_vs_simpleitk": ratio("evle", "SimpleITK"),
        "jpll_vs_dcm2niix": ratio("jpll", "dcm2niix"),
        "jpll_vs_simpleitk": ratio("jpll", "SimpleITK"),
        "peak_over_volume": round((ours["peak_mib"] - ours["imported_mib"]) / ours["volume_mib"], 3),
        "process_peak_over_volume": round(ours["peak_mib"] / ours["volume_mib"], 3),
        "seconds": {f"{name}/{reader}": round(one["seconds"], 3) for (name, reader), one in measured.items()},
        "slices": slices,
        "quick": quick,
        "device": platform.machine() + f"-{os.cpu_count()}cpu",
        "versions": {name: version(name) for name in ("imagecodecs", "isal", "dcm2niix", "SimpleITK", "numpy")},
    }
    target = Path(__file__).parent / "results" / f"ingest-{result['device']}.json"
    target.parent.mkdir(exist_ok=True)
    if not quick:
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
