"""How good the output is on held-out phantoms: models and networks trained for as long, and their bounds.

    python infra/bench/quality.py [--quick] [--work DIR] [--patients 24] [--cpu-seconds 240] [--seeds 0,1,2]

Runs the commands that a user would, once a seed: phantom, ingest, encode (tiny VAE), train-regression, encode
--refiner, train --refiner (refine, then diffuse), train (from interpolation), evaluate on the locked test split. Every
training gets the same processor seconds of one thread (``budget.max_cpu_seconds``), so that a loaded machine costs
little; refine-then-diffuse needs two of them, and ``regression_longer``, the same network trained for both, says what
the second would have bought there. Scores are those of ``ctpipe evaluate`` between -160 and 240 HU: PSNR and SSIM by
method, means over held-out patients and then over seeds, with the standard deviation over seeds; HU bias by tissue;
RMS(Ax - y) over that of the true thin series. What counts is the gain over cubic made consistent, which no learning
takes, in PSNR and in SSIM. ``model_mean`` is one step of the bridge, ``model_sample`` one draw in ten. Nodules and
vessels are measured against the volumes that the phantoms were built with. ``--work`` keeps the files, and a run again
resumes there. Prints a table, then one JSON object, also kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cli.main import app
from pipeline.metrics import TISSUE_CLASSES_HU

METHODS = (
    "nearest", "linear", "cubic", "cubic_back_projection", "cubic_consistent", "vae_ceiling", "regression",
    "regression_longer", "refined", "model_plain", "model_mean", "model_sample",
)  # fmt: skip
SAMPLER_STEPS = 10
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small phantoms, seconds of training: shows that it runs")
    parser.add_argument("--work", type=Path, help="folder to keep; a temporary one by default")
    parser.add_argument("--patients", type=int, default=24)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--slices", type=int, default=80)
    parser.add_argument("--cpu-seconds", type=float, default=240.0, help="processor seconds of each training")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", default="0,1,2", help="of phantoms, weights and patches; comma separated")
    options = parser.parse_args()
    if options.quick:
        options.patients, options.size, options.slices, options.cpu_seconds, options.seeds = 8, 64, 44, 4.0, "0"
    torch.set_num_threads(options.threads)
    each: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="ctpipe-quality-") as scratch:
        for seed in options.seeds.split(","):
            folder = (options.work or Path(scratch)) / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            each[seed] = of_seed(folder, int(seed), options)
            print(f"seed {seed}: " + ", ".join(f"{n} {v:.2f}" for n, v in each[seed]["psnr"].items()), flush=True)
    found = {
        **over_seeds(each),
        "by_seed": each,
        "settings": {k: v for k, v in vars(options).items() if k not in ("quick", "work")},
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "numpy", "scipy")},
    }
    print(table(found))
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        name = f"quality-{platform.machine()}-{os.cpu_count()}cpu.json"
        (RESULTS / name).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))


def of_seed(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one seed, kept as they are finished."""
    kept = folder / "figures.json"
    if kept.exists():
        figures: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return figures
    documents, seconds = run_commands(folder, seed, options)
    found = figures_of(documents)
    found["seconds"] = seconds
    found["training"] = {
        **{run: {"steps": trained_steps(folder / run)} for run in ("run", "plain")},
        **{run: json.loads((folder / run / "regression.json").read_text()) for run in ("regression", "longer")},
    }
    kept.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return found


def run_commands(
    folder: Path, seed: int, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The commands one after the other: the evaluations by name, and seconds of each. What is there is not made again.

    Evaluations: ``mean`` and ``sample`` of the model that starts from refined slices, ``plain`` of the one that starts
    from interpolated ones, ``longer`` with the regression network that was trained for twice as long.
    """
    data, store, run, plain, regression, longer = (
        folder / name for name in ("archive", "store", "run", "plain", "regression", "longer")
    )
    budget = [f"budget.max_cpu_seconds={options.cpu_seconds}", "budget.max_seconds=null", f"seed={seed}"]
    train = ["--preset", "tiny", *(word for one in budget for word in ("--set", one))]
    learn = ["--seed", seed, "--cpu-seconds"]
    steps: list[tuple[list[Any], Path | None]] = [
        (["phantom", data, "--patients", options.patients, "--size", options.size,
          "--thin-slices", options.slices, "--seed", seed], None),
        (["ingest", data, store], None),
        (["train-regression", store, regression, *learn, options.cpu_seconds], regression / "refiner.safetensors"),
        (["train-regression", store, longer, *learn, 2 * options.cpu_seconds], longer / "refiner.safetensors"),
        (["train", store, run, *train, "--refiner", regression], run / "checkpoints"),
        (["train", store, plain, *train], plain / "checkpoints"),
    ]  # fmt: skip
    # The store's encoding comes first: the regression network asks it for the window.
    steps.insert(2, (["encode", store, "--vae", "tiny"], None))
    steps.insert(5, (["encode", store, "--vae", "tiny", "--refiner", regression], None))
    looks: dict[str, tuple[Path, list[Any]]] = {
        "mean": (run, ["--regression", regression]),
        "longer": (run, ["--regression", longer]),
        "sample": (run, ["--steps", SAMPLER_STEPS]),
        "plain": (plain, []),
    }
    seconds: dict[str, float] = {}
    documents = {}
    for words, result in steps:
        if result is None or not result.exists():
            called(words, seconds)
    for name, (which, more) in looks.items():
        called(["evaluate", store, which, "--split", "test", "--vae", "tiny", *more], seconds)
        path = which / "evaluation" / "test" / "metrics.json"
        documents[name] = json.loads(path.read_text(encoding="utf-8"))
    return documents, seconds


def called(words: list[Any], seconds: dict[str, float]) -> None:
    """Run a command; its seconds are added up by its name."""
    start = time.monotonic()
    code = app([str(word) for word in words], standalone_mode=False)
    seconds[str(words[0])] = round(seconds.get(str(words[0]), 0.0) + time.monotonic() - start, 1)
    if code:
        raise SystemExit(f"ctpipe {words[0]} ended with {code}")


def trained_steps(run: Path) -> int:
    """The step that a run ended at."""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(json.loads(line)["step"]) for line in lines)


def figures_of(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The keys of the design's benchmark `quality`, and what goes with them, of one seed."""
    document = documents["mean"]
    methods = {name: document["methods"][name] for name in METHODS if name in document["methods"]}
    methods["model_mean"] = document["methods"]["model"]
    methods["model_sample"] = documents["sample"]["methods"]["model"]
    methods["model_plain"] = documents["plain"]["methods"]["model"]
    methods["regression_longer"] = documents["longer"]["methods"]["regression"]

    def by_method(figure: str, digits: int) -> dict[str, float]:
        return {n: round(methods[n][figure], digits) for n in METHODS if methods[n].get(figure) is not None}

    return {
        "psnr": by_method("psnr_db", 3),
        "ssim": by_method("ssim", 4),
        "mae_hu": by_method("mae_hu", 2),
        "hu_bias": {
            name: {t: round(row[f"{t}_bias_hu"], 2) for t in TISSUE_CLASSES_HU if row.get(f"{t}_bias_hu") is not None}
            for name, row in methods.items()
        },
        "consistency_ratio": by_method("consistency_ratio", 3),
        "edge_excess_mm": by_method("edge_excess_mm", 3),
        "detail_explained": by_method("detail_explained", 3),
        "roughness_ratio": by_method("roughness_ratio", 3),
        "noise_hu": by_method("noise_hu", 2),
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
        "window_hu": document["window_hu"],
        "failures": {name: one["failures"] for name, one in documents.items()},
    }


def over_seeds(each: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds and their standard deviations, and the gains over cubic made consistent."""

    def stated(rows: list[dict[str, float]], digits: int) -> dict[str, dict[str, float]]:
        names = [name for name in METHODS if all(name in row for row in rows)]
        values = {name: [row[name] for row in rows] for name in names}
        return {
            name: {
                "mean": round(statistics.fmean(v), digits),
                "sd": round(statistics.stdev(v), digits) if len(v) > 1 else 0.0,
            }
            for name, v in values.items()
        }

    found: dict[str, Any] = {}
    for figure, digits in (("psnr", 3), ("ssim", 4)):
        rows = [one[figure] for one in each.values()]
        found[figure] = {name: row["mean"] for name, row in stated(rows, digits).items()}
        found[f"{figure}_sd"] = {name: row["sd"] for name, row in stated(rows, digits).items()}
        gains = [{name: value - row["cubic_consistent"] for name, value in row.items()} for row in rows]
        found[f"{figure}_gain_over_consistent"] = stated(gains, digits)
    found["held_out_patients"] = sum(one["held_out_patients"] for one in each.values())
    return found


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{'':24s} {'PSNR':>14s} {'SSIM':>16s} {'over cubic made consistent':>30s}"]
    for name in (n for n in METHODS if n in found["psnr"]):
        psnr, ssim = (f"{found[f][name]:.{d}f} ± {found[f + '_sd'][name]:.{d}f}" for f, d in (("psnr", 2), ("ssim", 4)))
        gain, similar = (found[f"{f}_gain_over_consistent"][name]["mean"] for f in ("psnr", "ssim"))
        lines.append(f"{name:24s} {psnr:>14s} {ssim:>16s} {f'{gain:+.2f} dB  {similar:+.4f}':>30s}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
