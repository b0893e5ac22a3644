"""How good the output is on held-out phantoms: a model and a regression network trained for as long, and their bounds.

    python infra/bench/quality.py [--quick] [--work DIR] [--patients 24] [--train-seconds 240]

Runs the commands that a user would: phantom, ingest, encode (tiny VAE), train (preset ``tiny``), train-regression
(``--like`` the model: the same training split, the same seconds), evaluate on the locked test split. Scores are those
of ``ctpipe evaluate`` between -160 and 240 HU, means over held-out patients: PSNR and SSIM by method, HU bias by
tissue, and RMS(Ax - y) of the model's output over that of the true thin series (1: agrees with the measured slices as
well as the truth). Nodules and vessels are measured against the volumes that the phantoms were built with. Training
time is wall time, so a loaded machine gives a worse model; steps and seconds stand in the result. ``--work`` keeps the
files, and a run again resumes there. Prints a table, then one JSON object, also kept in infra/bench/results/ (not with
--quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cli.main import app
from pipeline.evaluation import label, ordered
from pipeline.metrics import TISSUE_CLASSES_HU

WINDOW_METHODS = (
    "nearest", "linear", "cubic", "cubic_back_projection", "cubic_consistent", "vae_ceiling", "regression", "model",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small phantoms, seconds of training: shows that it runs")
    parser.add_argument("--work", type=Path, help="folder to keep; a temporary one by default")
    parser.add_argument("--patients", type=int, default=24)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--slices", type=int, default=80)
    parser.add_argument("--train-seconds", type=float, default=240.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.quick:
        options.patients, options.size, options.slices, options.train_seconds = 8, 64, 44, 4.0
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="ctpipe-quality-") as scratch:
        folder = options.work or Path(scratch)
        seconds = run_commands(folder, options)
        document = json.loads((folder / "run" / "evaluation" / "test" / "metrics.json").read_text(encoding="utf-8"))
        steps = trained_steps(folder / "run")
    found = {
        **figures(document),
        "training": {
            "model": {"steps": steps, "seconds": options.train_seconds},
            "regression": {k: document["regression"][k] for k in ("steps", "seconds", "parameters", "pairs")},
        },
        "seconds": seconds,
        "settings": {k: v for k, v in vars(options).items() if k not in ("quick", "work")},
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "numpy", "scipy")},
    }
    print(table(document))
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        name = f"quality-{platform.machine()}-{os.cpu_count()}cpu.json"
        (RESULTS / name).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))


def run_commands(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """The commands one after the other; seconds of each. One whose result is there is not run again."""
    data, store, run, regression = (folder / name for name in ("archive", "store", "run", "regression"))
    steps: list[tuple[list[Any], Path | None]] = [
        (["phantom", data, "--patients", options.patients, "--size", options.size,
          "--thin-slices", options.slices, "--seed", options.seed], None),
        (["ingest", data, store], None),
        (["encode", store, "--vae", "tiny"], None),
        (["train", store, run, "--preset", "tiny", "--set", f"budget.max_seconds={options.train_seconds}",
          "--set", f"seed={options.seed}"], run / "checkpoints"),
        (["train-regression", store, regression, "--like", run], regression / "refiner.safetensors"),
        (["evaluate", store, run, "--split", "test", "--vae", "tiny", "--regression", regression], None),
    ]  # fmt: skip
    seconds: dict[str, float] = {}
    for words, result in steps:
        if result is not None and result.exists():
            continue
        start = time.monotonic()
        code = app([str(word) for word in words], standalone_mode=False)
        seconds[str(words[0])] = round(time.monotonic() - start, 1)
        if code:
            raise SystemExit(f"ctpipe {words[0]} ended with {code}")
    return seconds


def trained_steps(run: Path) -> int:
    """The step that a run ended at."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(json.loads(line)["step"]) for line in lines)


def figures(document: dict[str, Any]) -> dict[str, Any]:
    """The keys of the design's benchmark `quality`, and what goes with them."""
    methods = {name: document["methods"][name] for name in WINDOW_METHODS}

    def by_method(figure: str, digits: int) -> dict[str, float]:
        return {n: round(row[figure], digits) for n, row in methods.items() if row.get(figure) is not None}

    model = methods["model"]
    return {
        "psnr": by_method("psnr_db", 3),
        "ssim": by_method("ssim", 4),
        "mae_hu": by_method("mae_hu", 2),
        "hu_bias": {
            name: {t: round(row[f"{t}_bias_hu"], 2) for t in TISSUE_CLASSES_HU if row.get(f"{t}_bias_hu") is not None}
            for name, row in methods.items()
        },
        "consistency_ratio": round(model["consistency_ratio"], 3),
        "consistency_ratio_by_method": by_method("consistency_ratio", 3),
        "edge_excess_mm": by_method("edge_excess_mm", 3),
        "detail_explained": by_method("detail_explained", 3),
        "volumetry": {
            kind: {
                name: {
                    figure: round(row[f"{kind}_{figure}"], 3)
                    for figure in ("total_error", "mean_absolute_error", "missed", "count")
                }
                for name, row in methods.items()
                if row.get(f"{kind}_count") is not None
            }
            for kind in ("nodule", "vessel")
        },
        "held_out_patients": document["patients"],
        "gain_over_cubic_db": {n: round(row["mean"], 3) for n, row in document["against_cubic"].items()},
        "window_hu": document["window_hu"],
        "failures": document["failures"],
    }


def table(document: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'':42s} {'PSNR':>7s} {'SSIM':>7s} {'MAE':>6s} {'RMS(Ax-y) / truth':>18s}"]
    for name in ordered(document["methods"]):
        row = document["methods"][name]
        ratio = row.get("consistency_ratio")
        cells = f"{row['psnr_db']:7.2f} {row['ssim']:7.4f} {row['mae_hu']:6.2f}"
        lines.append(f"{label(name):42s} {cells} {'-' if ratio is None else f'{ratio:.2f}':>18s}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
