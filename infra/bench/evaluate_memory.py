"""Peak memory of scoring full-size cases: the real scoring path, one case after the other.

    python infra/bench/evaluate_memory.py [--quick] [--shape 300 512 512] [--cases 3] [--methods linear model]

Every case makes a thick and a thin series in memory (as reading does), then every classical method and two stand-ins of
the size of decoded volumes (VAE round trip and the composed model), each scored with every figure and dropped, as
``pipeline.evaluate_store`` does. The decoder's own memory is bounded by ``--memory-gib`` and measured by
``infra/bench/vae.py``; it is not part of this figure. The peak is VmHWM, the process's own high-water mark, reset
before every case: a case that left something behind would show in the next one's peak. Methods are scored one after
the other on volumes of one size, so that two of them (--methods) show the peak of all: the composed one is made beside
a decoded condition, which is the most that is alive at once. Prints a line a case, then one JSON object, which is also
kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.baselines import BASELINES, apply, weights
from pipeline.compose import compose
from pipeline.evaluate import Case, score_method
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.volume import Volume

WINDOW = Window(0.0, 2000.0)
BOUND_GIB = 4.0
ALL = (*BASELINES, "condition_round_trip", "model")


def status_gib(field: str) -> float:
    """A field of /proc/self/status in GiB; ``ru_maxrss`` would carry the parent's peak over."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError(f"no {field} in /proc/self/status")


def reset_peak() -> None:
    """Set VmHWM back to what is resident now (Linux: proc(5), clear_refs 5)."""
    Path("/proc/self/clear_refs").write_text("5")


def made(shape: tuple[int, int, int], seed: int) -> tuple[Volume, Volume]:
    """A body with noise, (thick, thin), int16."""
    depth, rows, columns = shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    body = ((y - rows / 2) / (0.4 * rows)) ** 2 + ((x - columns / 2) / (0.45 * columns)) ** 2 < 1
    lung = ((y - rows / 2) / (0.2 * rows)) ** 2 + ((x - columns / 2) / (0.3 * columns)) ** 2 < 1
    thin = np.empty(shape, np.int16)
    for k in range(depth):
        dome = lung & (np.hypot(y - rows / 2, x - columns / 2) / rows < 0.25 * k / depth)
        thin[k] = np.where(dome, -850, np.where(body, 40, -1000)) + rng.normal(0, 15, (rows, columns))
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    fine = Geometry(shape, affine, tuple(float(k) for k in range(depth)), 1.0)
    coarse = fine.with_z(2.0 + 5.0 * np.arange(depth // 5), 5.0)
    operator = slice_operator(SliceProfile("box", 5.0), np.array(coarse.z_mm), np.array(fine.z_mm))
    flat = np.empty(coarse.shape_zyx, np.int16)
    for row in range(0, rows, 32):
        flat[:, row : row + 32] = np.rint(operator.apply(thin[:, row : row + 32]))
    return Volume(flat, coarse), Volume(thin, fine)


def score_case(thick: Volume, thin: Volume, methods: tuple[str, ...]) -> dict[str, Any]:
    """PSNR of every method, each volume made, scored with every figure, and dropped."""
    profile = SliceProfile("box", 5.0)
    thick_z, thin_z = np.array(thick.geometry.z_mm), np.array(thin.geometry.z_mm)
    operator = slice_operator(profile, thick_z, thin_z)
    case = Case(thin.hu, thin.geometry, thick.geometry.z_mm, operator, thick.hu)
    figures: dict[str, Any] = {}
    for method in BASELINES:
        if method in methods:
            volume = apply(weights(method, thick_z, thin_z, profile), thick.hu)
            figures[method] = score_method(volume, case, WINDOW)["psnr_db"]
            del volume
    condition = apply(weights("linear", thick_z, thin_z, profile), thick.hu)
    if "condition_round_trip" in methods:
        figures["condition_round_trip"] = score_method(condition, case, WINDOW, whole_range=False)["psnr_db"]
    if "model" in methods:
        model, _ = compose(condition + np.float32(1), WINDOW, thick, thin.geometry, condition_hu=condition)
        del condition
        figures["model"] = score_method(model, case, WINDOW)["psnr_db"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60x128x128, 2 cases: shows that it runs")
    parser.add_argument("--shape", type=int, nargs=3, default=(300, 512, 512))
    parser.add_argument("--cases", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=ALL, default=ALL)
    args = parser.parse_args()
    shape, count = ((60, 128, 128), 2) if args.quick else (tuple(args.shape), args.cases)
    rows = []
    for number in range(count):
        reset_peak()
        start = time.perf_counter()
        thick, thin = made((int(shape[0]), int(shape[1]), int(shape[2])), number)
        figures = score_case(thick, thin, tuple(args.methods))
        del thick, thin
        row = {
            "case": number,
            "seconds": round(time.perf_counter() - start, 1),
            "peak_gib": round(status_gib("VmHWM"), 3),
            "left_gib": round(status_gib("VmRSS"), 3),
        }
        rows.append(row)
        said = {name: value and round(value, 2) for name, value in figures.items()}
        print(json.dumps({**row, "psnr_db": said}), flush=True)
    found = {
        "shape": list(shape),
        "methods": list(args.methods),
        "cases": rows,
        "peak_gib": max(row["peak_gib"] for row in rows),
        "bound_gib": BOUND_GIB,
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("numpy", "scipy")},
    }
    if not args.quick:
        out = Path(__file__).parent / "results" / f"evaluate_memory-{platform.machine()}-{os.cpu_count()}cpu.json"
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))
    if found["peak_gib"] >= BOUND_GIB:
        raise SystemExit(f"peak {found['peak_gib']} GiB, expected less than {BOUND_GIB}")


if __name__ == "__main__":
    main()
