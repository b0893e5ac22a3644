"""How long it takes to find what has changed among a million loose files: listing, first ingest, unchanged re-ingest.

    python infra/bench/discover.py [--patients 10000] [--files 100] [--quick]

Every patient is a folder of loose files, four of them genuine slices of one series, the others empty, spread over two
folders. Listing and an unchanged re-ingest look at files and open none, so that their content does not matter; a first
ingest opens each. `linear` is the listing's time a file over that for half as many patients: 1 where time is linear in
the number of files. Every step runs in a process of its own, with the files' entries in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
SLICES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=100, help="of every patient")
    parser.add_argument("--quick", action="store_true", help="1,000 patients of 30 files: under a minute")
    parser.add_argument("--child", nargs=3, metavar=("STEP", "DATASET", "STORE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        step, dataset, store = options.child
        print(json.dumps(_measured(lambda: STEPS[step](dataset, store))))
        return
    if options.quick:
        options.patients, options.files = 1_000, 30
    with tempfile.TemporaryDirectory() as scratch:
        half, rest = Path(scratch, "data", "APE"), Path(scratch, "data", "non-APE")
        started = time.perf_counter()
        _make(half, range(options.patients // 2), options.files)
        _make(rest, range(options.patients // 2, options.patients), options.files)
        made = time.perf_counter() - started
        store = str(Path(scratch, "store"))
        steps = {
            "list half": _child("list", str(half), store),
            "list": _child("list", str(half.parent), store),
            "first ingest": _child("ingest", str(half.parent), store),
            "unchanged": _child("ingest", str(half.parent), store),
        }
    assert steps["list"]["archives"] == steps["unchanged"]["outcomes"]["unchanged"] == options.patients
    assert steps["first ingest"]["outcomes"] == {"new": options.patients}
    _report(steps, options, made)


def _make(folder: Path, patients: range, files: int) -> None:
    from tests.support.hospital import Scan

    number = "9999999"
    scan = Scan(f"1.2.{number}.5", SLICES, study=f"1.2.{number}", patient=f"P{number}", frame=f"1.9.{number}")
    slices = scan.files()
    for patient in patients:
        first, second = folder / f"patient_{patient:06}" / "1", folder / f"patient_{patient:06}" / "2"
        first.mkdir(parents=True)
        second.mkdir()
        for i in range(files):
            name = os.path.join(first if i % 2 else second, f"I{i:05}")
            descriptor = os.open(name, os.O_CREAT | os.O_WRONLY, 0o644)
            if i < SLICES:
                os.write(descriptor, slices[i].replace(number.encode(), b"%07d" % patient))
            os.close(descriptor)


def _list(dataset: str, store: str) -> dict[str, Any]:
    from pipeline.archive import stream_archives

    started = time.perf_counter()
    archives, first = 0, 0.0
    for _ in stream_archives(dataset):
        archives += 1
        first = first or time.perf_counter() - started
    return {"archives": archives, "first_archive_s": first}


def _ingest(dataset: str, store: str) -> dict[str, Any]:
    from pipeline.ingest import ingest, open_stores

    return {"outcomes": ingest(dataset, *open_stores(store)).archives}


STEPS: dict[str, Callable[[str, str], dict[str, Any]]] = {"list": _list, "ingest": _ingest}


def _measured(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    answer = step()
    answer |= {"seconds": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    # ru_maxrss would carry the parent's peak over through exec.
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return {**answer, "peak_gib": int(peak) / 2**20}


def _child(step: str, dataset: str, store: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", step, dataset, store]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return measured


def _report(steps: dict[str, dict[str, Any]], options: argparse.Namespace, made: float) -> None:
    files = options.patients * options.files
    print(f"{files:,} loose files of {options.patients:,} patients (made in {made:.0f} s)")
    print(f"{'step':<14}{'seconds':>9}{'CPU s':>8}{'us a file':>11}{'peak GiB':>10}")
    for name, step in steps.items():
        count = files // 2 if name == "list half" else files
        each = step["seconds"] / count * 1e6
        print(f"{name:<14}{step['seconds']:>9.1f}{step['cpu_s']:>8.1f}{each:>11.1f}{step['peak_gib']:>10.2f}")
    print(f"first archive found after {steps['list']['first_archive_s'] * 1000:.0f} ms")
    result: dict[str, Any] = {
        "bench": "discover",
        "quick": options.quick,
        "files": files,
        "patients": options.patients,
        "linear": round(steps["list"]["cpu_s"] / (2 * steps["list half"]["cpu_s"]), 3),
        "first_archive_s": round(steps["list"]["first_archive_s"], 4),
        "device": platform.machine(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    for name, step in steps.items():
        key = name.replace(" ", "_")
        result |= {f"{key}_{what}": round(step[what], 3) for what in ("seconds", "cpu_s", "peak_gib")}
    text = json.dumps(result, sort_keys=True)
    if not options.quick:
        folder = ROOT / "infra" / "bench" / "results"
        folder.mkdir(exist_ok=True)
        (folder / "discover-cpu.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
