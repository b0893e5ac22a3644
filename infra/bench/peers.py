"""Other people's programs on the chest that the shipped model never saw: SOUP-GAN's thin-to-thin network, and ECLARE.

    python infra/bench/peers.py [--real FOLDER] [--kevinsr PYTHON FOLDER] [--eclare FOLDER] [--limit 900]

The middle of a human chest (1.5 mm), made 5 mm thick by a box and by a profile that training never draws: 96 x 96
pixels. Each peer runs in a process of its own, under a limit of seconds; what it says of a time is the process's own.

- SOUP-GAN: PyPI `KevinSR` 0.1.20, in an environment of its own with TensorFlow 2.15; --kevinsr names that Python and
  the unpacked source, whose `Thin-to-thin` network is the only one that comes with it (the thick-to-thin one is fetched
  from a file host, which this bench does not do). Its output spans the outermost thick slices evenly and is
  interpolated to the thin positions.
- ECLARE: PyPI `eclare` 1.0.1, --eclare names the folder it is installed in. It trains on the study itself, 1,000,000
  patches by default; how many it does within the limit is measured, and from that how long the whole would take here.
  No quality is stated for a training that is cut short.

PSNR and SSIM over [-1000, 1000] HU. Prints a table, then one JSON object, kept in infra/bench/results/peers-cpu.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pretrained import answers, cases
from refiner import Case, figures_of

from pipeline.metrics import ssim
from pipeline.refiner import load_pretrained
from pipeline.volume import Volume, Window

ROOT = Path(__file__).resolve().parents[2]
CASES = ("chest, 5 mm box", "chest, 5 mm new")
WINDOW = Window.parse("maisi")
SIDE, THREADS = 96, 2
ECLARE_PATCHES = 1_000_000
SOUP_GAN = """
import os, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
os.chdir(sys.argv[2])
os.makedirs("Thick-to-thin", exist_ok=True)  # else it would be fetched
if not os.path.exists("Thin-to-thin"):
    os.symlink(os.path.join(sys.argv[1], "KevinSR", "Thin-to-thin"), "Thin-to-thin")
from KevinSR import SOUP_GAN
thick = np.load("thick.npy").astype(np.float64)
np.save("thin.npy", SOUP_GAN(thick, float(sys.argv[3]), 1))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(os.environ.get("CTPIPE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real"),
    )
    parser.add_argument("--model", default="default")
    parser.add_argument("--kevinsr", nargs=2, metavar=("PYTHON", "FOLDER"))
    parser.add_argument("--eclare", type=Path, metavar="FOLDER")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds of each run of a peer")
    parser.add_argument("--chest-slices", type=int, default=60)
    options = parser.parse_args()
    options.quick = False
    table: dict[str, dict[str, Any]] = {}
    for name in CASES:
        case = cropped(cases(options)[name]())
        table[name] = {way: figures(make(case), case) for way, make in answers(models(options), THREADS).items()}
        table[name]["SOUP-GAN thin-to-thin"] = soup_gan(case, options)
        for way, row in table[name].items():
            print(f"{name:<18}{way:<24}{row}")
    eclare = eclare_rate(cropped(cases(options)[CASES[0]]()), options)
    print("ECLARE", eclare)
    result = {"bench": "peers", "table": table, "eclare": eclare, "side": SIDE, "cores": os.cpu_count()}
    (Path(__file__).parent / "results" / "peers-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def models(options: argparse.Namespace) -> dict[str, Any]:
    """The shipped model by its name."""
    return {options.model: load_pretrained(options.model)}


def cropped(case: Case) -> Case:
    """The middle of the field: peers are slow."""

    def middle(volume: Volume) -> Volume:
        rows, columns = ((n - SIDE) // 2 for n in volume.hu.shape[1:])
        hu = np.ascontiguousarray(volume.hu[:, rows : rows + SIDE, columns : columns + SIDE])
        return Volume(hu, replace(volume.geometry, shape_zyx=hu.shape), volume.header, volume.flags)

    return replace(case, thick=middle(case.thick), thin=middle(case.thin))


def figures(hu: NDArray[np.float32], case: Case) -> dict[str, float]:
    """PSNR, SSIM and bias."""
    clipped, truth = (np.clip(np.asarray(v, np.float32), WINDOW.lower, WINDOW.upper) for v in (hu, case.thin.hu))
    found = figures_of(hu, case.thin.hu)
    kept = {"psnr_db": found["psnr_db"], "ssim": round(ssim(clipped, truth, data_range=WINDOW.width), 4)}
    return kept | {name: value for name, value in found.items() if name.startswith("bias_") and "own" not in name}


def soup_gan(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Figures of SOUP-GAN's thin-to-thin network, or why there are none."""
    if not options.kevinsr:
        return {"not run": "no --kevinsr given"}
    python, source = options.kevinsr
    thick_z, thin_z = np.asarray(case.thick.geometry.z_mm), np.asarray(case.thin.geometry.z_mm)
    factor = round(float(np.diff(thick_z).mean() / np.diff(thin_z).mean()), 3)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "thick.npy", np.moveaxis(case.thick.hu, 0, -1))
        words = [python, "-c", SOUP_GAN, str(Path(source).resolve()), folder, str(factor)]
        start = time.perf_counter()
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=options.limit)
        except subprocess.TimeoutExpired:
            return {"not run": f"no result within {options.limit:g} s"}
        if done.returncode:
            return {"not run": done.stderr.strip().splitlines()[-1][:200]}
        seconds = time.perf_counter() - start
        made = np.moveaxis(np.load(Path(folder) / "thin.npy"), -1, 0)
    low = float(case.thick.hu.min())
    hu = made * (float(case.thick.hu.max()) - low) / 10_000 + low
    at = np.linspace(thick_z[0], thick_z[-1], len(hu))
    flat = hu.reshape(len(hu), -1)
    below = np.clip(np.searchsorted(at, thin_z) - 1, 0, len(at) - 2)
    share = np.clip((thin_z - at[below]) / (at[1] - at[0]), 0, 1)[:, None]
    thin = ((1 - share) * flat[below] + share * flat[below + 1]).reshape(len(thin_z), *hu.shape[1:])
    return figures(thin.astype(np.float32), case) | {"seconds": round(seconds, 1)}


def eclare_rate(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """How fast ECLARE trains here, and how long its whole training would take."""
    if not options.eclare:
        return {"not run": "no --eclare given"}
    import nibabel

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "thick.nii.gz"
        steps = case.thick.geometry.spacing_mm_zyx
        affine = np.diag([steps[2], steps[1], steps[0], 1.0])
        nibabel.save(nibabel.Nifti1Image(case.thick.hu.transpose(2, 1, 0).astype(np.float32), affine), path)
        words = [sys.executable, "-m", "eclare.main", "--in-fpath", str(path), "--out-dir", folder]
        words += ["--relative-slice-thickness", "1.0"]
        environment = os.environ | {"PYTHONPATH": str(options.eclare.resolve()), "OMP_NUM_THREADS": str(THREADS)}
        with (Path(folder) / "log").open("w+") as log:
            program = "from eclare.main import main; main()"
            words = [sys.executable, "-c", program, *words[3:]]
            process = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
            start = time.perf_counter()
            try:
                process.wait(options.limit)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            seconds = time.perf_counter() - start
            log.seek(0)
            text = log.read()
    counts = [int(found) for found in re.findall(r"(\d+)/\d+ \[", text)]
    if not counts or not max(counts):
        return {"not run": (text.strip().splitlines() or ["no output"])[-1][:200], "seconds": round(seconds)}
    rate = max(counts) / seconds
    return {
        "patches": max(counts),
        "seconds": round(seconds),
        "hours_of_its_whole_training": round(ECLARE_PATCHES / rate / 3600, 1),
    }


if __name__ == "__main__":
    main()
