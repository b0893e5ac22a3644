"""The regression network of an earlier commit, on the phantoms and for the steps of `quality.py`: what was won since.

    python infra/bench/regression_before.py [--commit 3d7d81d] [--seeds 1,2,3] [--steps 438] [--work DIR] [--quick]

Needs the project's git history. Phantoms are made by today's command; the commit's own code, taken out of git, ingests
and encodes them, trains its regression network (from interpolated slices, for as many steps of patches of the same size
as quality.py's) and evaluates it on its locked test split. Held out are other patients of the same archive than
in quality.py, so what can be compared is the gain over cubic made consistent, in PSNR and SSIM. Prints a table with the
gains that quality.py found last, then one JSON object, also kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
MODULE = "from cli.main import main; main()"
STEPS = "import torch, cli.train_regression as t; torch.set_num_threads(1); t.ALL_STEPS = {}; " + MODULE
"""The command of then takes seconds alone, which a busy machine would turn into fewer steps."""
BASE, NETWORK = "cubic_consistent", "regression"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", default="3d7d81d")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=438)
    parser.add_argument("--patients", type=int, default=20)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--work", type=Path, help="folder to keep; a temporary one by default")
    parser.add_argument("--quick", action="store_true", help="small phantoms, few steps: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.patients, options.size, options.steps, options.seeds = 8, 64, 4, "1"
    with tempfile.TemporaryDirectory(prefix="ctpipe-before-") as scratch:
        work = options.work or Path(scratch)
        code = code_of(options.commit, work / f"code-{options.commit}")
        rows = {seed: of_seed(work / f"seed-{seed}", code, int(seed), options) for seed in options.seeds.split(",")}
    found: dict[str, Any] = {
        "bench": "regression_before",
        "device": f"{platform.machine()}-{os.cpu_count()}cpu",
        "settings": {name: value for name, value in vars(options).items() if name not in ("work", "quick")},
        "by_seed": rows,
        **{f"{figure}_gain_over_consistent": gain(rows, figure) for figure in ("psnr", "ssim")},
    }
    print(table(found))
    if not options.quick:
        (RESULTS / "regression_before-cpu.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))


def code_of(commit: str, folder: Path) -> Path:
    """The tree of a commit, in a folder."""
    if not folder.exists():
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(packed)) as tree:
            tree.extractall(folder, filter="data")
    return folder


def of_seed(folder: Path, code: Path, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """PSNR and SSIM by method, of one seed. What is there is not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    archive, store, run, network = (folder / name for name in ("archive", "store", "run", "network"))
    size = ["--patients", options.patients, "--size", options.size, "--thin-slices", 44 if options.quick else 80]
    # An evaluation of then needs a diffusion run: one of eight steps, which nothing here looks at.
    work: list[tuple[Path, str, list[Any]]] = [
        (ROOT, MODULE, ["phantom", archive, *size, "--seed", seed]),
        (code, MODULE, ["ingest", archive, store]),
        (code, MODULE, ["encode", store, "--vae", "tiny", "--roles", "thin,thick_on_thin"]),
        (code, MODULE, ["train", store, run, "--preset", "tiny", "--max-steps", 8]),
        (code, STEPS.format(options.steps), ["train-regression", store, network, "--seconds", 10**6, "--seed", seed]),
        (code, MODULE, ["evaluate", store, run, "--split", "test", "--vae", "tiny", "--regression", network]),
    ]
    for number, (place, program, words) in enumerate(work):
        done = folder / f"done-{number}"
        if not done.exists():
            environment = {**os.environ, "PYTHONPATH": str(place), "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, "-c", program, *map(str, words)], cwd=place, env=environment, check=True)
            done.touch()
    methods = json.loads((run / "evaluation" / "test" / "metrics.json").read_text(encoding="utf-8"))["methods"]
    names = {"psnr": "psnr_db", "ssim": "ssim"}
    return {figure: {m: round(methods[m][name], 4) for m in methods} for figure, name in names.items()}


def gain(rows: dict[str, dict[str, dict[str, float]]], figure: str) -> dict[str, float]:
    """Mean and standard deviation over seeds of what the network adds to cubic made consistent."""
    each = [row[figure][NETWORK] - row[figure][BASE] for row in rows.values()]
    return {"mean": round(statistics.fmean(each), 4), "sd": round(statistics.stdev(each), 4) if len(each) > 1 else 0.0}


def table(found: dict[str, Any]) -> str:
    """Gains over cubic made consistent: of then, and those that quality.py found last."""
    kept = json.loads((RESULTS / "quality-x86_64-2cpu.json").read_text(encoding="utf-8"))
    gains = [
        {
            f"regression network of {found['settings']['commit']}": found[f"{figure}_gain_over_consistent"],
            **{name: kept[f"{figure}_gain_over_consistent"][name] for name in ("regression", "model_mean")},
        }
        for figure in ("psnr", "ssim")
    ]
    lines = [f"{'over cubic made consistent':36s} {'PSNR':>18s} {'SSIM':>20s}"]
    for name, psnr in gains[0].items():
        ssim = gains[1][name]
        lines.append(f"{name:36s} {psnr['mean']:+9.2f} ± {psnr['sd']:.2f} dB {ssim['mean']:+11.4f} ± {ssim['sd']:.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
