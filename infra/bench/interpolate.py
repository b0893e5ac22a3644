"""One study by the shipped models, as `ctpipe interpolate` does it: stages, seconds, memory; cubic resampling beside.

    python infra/bench/interpolate.py [--quick] [--models default,fast] [--device auto]

A synthetic chest's thick slices, 60 of 512 x 512 every 5 mm (`--quick`: 12 of 128 x 128), stretched from a smaller
phantom so that making them costs no minutes, go from a zip of DICOM to 300 thin slices on disk. Every row is a process
of its own, whose peak memory is the kernel's figure. SimpleITK's B-spline and scipy's cubic spline resample the same
array to the same positions in memory, without reading or writing. Prints a table, then one JSON object, which is kept
in infra/bench/results/ too (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
STUDY, SMALL = (60, 512, 512), (12, 128, 128)
SPACING_MM, PIXEL_MM, FACTOR = 5.0, 0.75, 5
PEERS = ("SimpleITK cubic", "scipy cubic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small study: shows that it runs")
    parser.add_argument("--models", default="default,fast", help="names or paths, by comma")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(measured(options.row, options.work, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shape = SMALL if options.quick else STUDY
        np.save(work / "thick.npy", write_study(work, shape))
        rows = {name: in_process(name, work, options) for name in (*options.models.split(","), *PEERS)}
    report(rows, shape, options)


def write_study(work: Path, shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """A zip of DICOM with thick slices; returns them."""
    from scipy.ndimage import zoom

    from pipeline.phantom import make_patient

    small = make_patient(3, min(shape[1], 128), shape[0], "non-APE").thick.hu
    hu = zoom(small.astype(np.float32), [n / m for n, m in zip(shape, small.shape, strict=True)], order=1)
    hu = np.rint(hu + np.random.default_rng(0).normal(0, 6, hu.shape)).astype(np.int16)
    sys.path.insert(0, str(ROOT))
    from tests.support.dicom_files import series_files, zip_of

    def spaced(ds: Any, index: int) -> None:
        ds.PixelSpacing = [PIXEL_MM, PIXEL_MM]

    stored = np.clip(hu + 1024, 0, 4095).astype(np.uint16)
    zip_of(work / "thick.zip", series_files(stored, z=SPACING_MM * np.arange(shape[0]), tweak=spaced))
    return hu


def in_process(name: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A row measured in a process of its own; its error in words where it has one."""
    words = [sys.executable, __file__, "--row", name, "--work", str(work), "--device", options.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        [*words, "--threads", str(options.threads)], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(name: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every stage, and peak memory in GiB."""
    start = time.perf_counter()
    row = resampled(name, np.load(work / "thick.npy")) if name in PEERS else interpolated(name, work, options)
    row.setdefault("seconds", round(time.perf_counter() - start, 2))
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def interpolated(name: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The command's own path, imports counted apart."""
    start = time.perf_counter()
    import torch

    from pipeline.workflows import InterpolateJob, run_interpolation

    torch.set_num_threads(options.threads)
    imports = time.perf_counter() - start
    start = time.perf_counter()
    job = InterpolateJob(str(work / "thick.zip"), work / f"out-{Path(name).stem}", name, device=options.device)
    done = run_interpolation(job)
    whole = time.perf_counter() - start
    stages = dict(done.figures["stage_seconds"])
    stages["read, page, rest"] = round(whole - sum(stages.values()), 2)
    return {"seconds": round(whole, 2), "import_s": round(imports, 2), "stages": stages, "slices": done.slices}


def resampled(name: str, thick: NDArray[np.int16]) -> dict[str, Any]:
    """A peer's cubic resampling along z to the thin positions, in memory."""
    count = FACTOR * len(thick)
    if name.startswith("SimpleITK"):
        import SimpleITK

        image = SimpleITK.GetImageFromArray(thick)
        image.SetSpacing((PIXEL_MM, PIXEL_MM, SPACING_MM))
        size, spacing = (*thick.shape[:0:-1], count), (PIXEL_MM, PIXEL_MM, SPACING_MM / FACTOR)
        origin = (0.0, 0.0, -(SPACING_MM - SPACING_MM / FACTOR) / 2)
        start = time.perf_counter()
        SimpleITK.Resample(
            image,
            size,
            SimpleITK.Transform(),
            SimpleITK.sitkBSpline,
            origin,
            spacing,
            image.GetDirection(),
            -1024,
            SimpleITK.sitkInt16,
        )
        return {"seconds": round(time.perf_counter() - start, 2)}
    from scipy.interpolate import CubicSpline

    at = np.arange(len(thick)) * SPACING_MM
    wanted = (np.arange(count) + 0.5) * SPACING_MM / FACTOR - SPACING_MM / 2
    start = time.perf_counter()
    for row in range(0, thick.shape[1], 64):  # whole volumes as float64 would take 2.5 GB
        CubicSpline(at, thick[:, row : row + 64].astype(np.float32))(wanted).astype(np.int16)
    return {"seconds": round(time.perf_counter() - start, 2)}


def report(rows: dict[str, dict[str, Any]], shape: tuple[int, int, int], options: argparse.Namespace) -> None:
    """Print the table and the JSON object, and keep it."""
    import torch

    from pipeline.engines import resolve_device

    device = resolve_device(options.device)
    print(f"{shape[0]} -> {FACTOR * shape[0]} slices of {shape[1]} x {shape[2]} on {device}, {options.threads} threads")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:16s} {row['error']}")
            continue
        stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in row.get("stages", {}).items())
        print(f"{name:16s} {row['seconds']:7.1f} s  peak {row['peak_gib']:.2f} GiB  {stages}")
    result = {
        "bench": "interpolate",
        "device": device,
        "threads": options.threads,
        "shape_thick": shape,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "rows": rows,
    }
    if not options.quick:
        path = ROOT / "infra" / "bench" / "results" / f"interpolate-{device.replace(':', '')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
