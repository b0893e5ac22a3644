"""How good the output is on held-out phantoms: models and networks trained for as long, and their bounds.

    python infra/bench/quality.py [--quick] [--work DIR] [--patients 20] [--steps 438,970] [--seeds 1,2,3]

Runs the commands that a user would, once a seed: phantom, ingest, encode (tiny VAE), train-regression, encode
--refiner, train --refiner (refine, then diffuse), evaluate on the locked test split. The diffusion model starts twice:
from the slices of the regression network of the same budget (``model_*``), and from those of the model that ships
(``shipped_*``), which learnt for hours on other volumes: phantoms of seed 0, which is why no seed here is 0, and
genuine CT. With ``--more longer`` the regression network also trains for as long as both networks of refine-then-
diffuse, and with ``--more plain`` a model starts from interpolated slices.

Budgets are steps, so that a busy machine changes no figure: those that 240 seconds of one quiet core buy. Measured
with planes of 128 x 128 that were 438 of the regression network, whose patches have one size, and 1,517 of the model,
whose planes are whole: 970 at 160 x 160. Pixels there have 2 mm; the shipped model knows 0.45 to 2.2. Scores are
those of ``ctpipe evaluate`` between -160 and 240 HU: PSNR and SSIM by method, means over held-out patients and then
over seeds, with the standard deviation over seeds; HU bias by tissue; RMS(Ax - y) over that of the true thin series.
What counts is the gain over cubic made consistent, which no learning takes, in PSNR and in SSIM. ``_mean`` is one
step of the bridge, ``_sample`` one draw in ten, ``_textured`` the same draw with the noise that it lacks of true thin
slices' (``--texture``); ``_refined`` the slices that the model starts from, made consistent. Texture: the noise power
spectrum in even tissue (its root integral, ``noise_hu``, and that over the truth's, ``noise_ratio``) and the RMS second
difference along z over the truth's (``roughness_ratio``). Nodules and vessels are measured against the volumes that
the phantoms were built with. ``--work`` keeps the files, and a run again resumes there. Prints a table, then one JSON
object, also kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
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
    "regression_longer", "refined", "model_plain", "model_mean", "model_sample", "shipped_refined", "shipped_mean",
    "shipped_sample", "shipped_textured",
)  # fmt: skip
SAMPLER_STEPS = 10
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small phantoms, seconds of training: shows that it runs")
    parser.add_argument("--work", type=Path, help="folder to keep; a temporary one by default")
    parser.add_argument("--patients", type=int, default=20)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--slices", type=int, default=80)
    parser.add_argument("--steps", default="438,970", help="of the regression network and of each diffusion model")
    parser.add_argument("--more", default="", help="longer, plain: trainings beside, comma separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", default="1,2,3", help="of phantoms, weights and patches; comma separated")
    options = parser.parse_args()
    if options.quick:
        options.patients, options.size, options.slices, options.steps, options.seeds = 8, 64, 44, "4,20", "1"
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
    found["training"] = {run.parent.name: {"steps": trained_steps(run.parent)} for run in folder.glob("*/log.jsonl")}
    kept.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return found


def run_commands(
    folder: Path, seed: int, options: argparse.Namespace
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """The commands one after the other: the evaluations by name, and seconds of each. What is there is not made again.

    Evaluations: ``mean`` and ``sample`` of the model that starts from the regression network's slices; ``shipped``,
    ``shipped_sample`` and ``shipped_textured`` of the one that starts from the shipped model's; ``plain`` and
    ``longer`` where asked for.
    """
    data, store, again, regression = (folder / name for name in ("archive", "store", "again", "regression"))
    slow, steps = options.steps.split(",")
    schedule = [f"optimiser.steps={steps}", "optimiser.schedule=cosine", "budget.max_seconds=null", f"seed={seed}"]
    train = ["--preset", "tiny", *(word for one in schedule for word in ("--set", one))]
    learn = ["--seed", seed, "--steps"]
    roles = ["--roles", "thin,thick_on_thin" if "plain" in options.more else "thin"]
    phantoms = ["--patients", options.patients, "--size", options.size, "--thin-slices", options.slices]
    work: list[list[Any]] = [
        ["phantom", data, *phantoms, "--seed", seed],
        ["ingest", data, store],
        ["encode", store, "--vae", "tiny", *roles],
    ]
    # One refiner at a time under an encode key: the other start has a store of its own, with the same splits.
    for name, where, refiner in (("shipped", again, "default"), ("run", store, regression)):
        if refiner == regression:
            work.append(["train-regression", store, regression, *learn, slow])
        work.append(["encode", where, "--vae", "tiny", *roles, "--refiner", refiner])
        work.append(["train", where, folder / name, *train, "--refiner", refiner])
    looks: dict[str, tuple[Path, Path, list[Any]]] = {
        "mean": (store, folder / "run", ["--regression", regression]),
        "sample": (store, folder / "run", ["--steps", SAMPLER_STEPS]),
        "shipped": (again, folder / "shipped", []),
        "shipped_sample": (again, folder / "shipped", ["--steps", SAMPLER_STEPS]),
        "shipped_textured": (again, folder / "shipped", ["--steps", SAMPLER_STEPS, "--texture"]),
    }
    if "longer" in options.more:
        longer = folder / "longer"
        work.append(["train-regression", store, longer, *learn, 2 * int(slow)])
        looks["longer"] = (store, folder / "run", ["--regression", longer])
    if "plain" in options.more:
        work.append(["train", store, folder / "plain", *train])
        looks["plain"] = (store, folder / "plain", [])
    seconds: dict[str, float] = {}
    documents = {}
    for number, command in enumerate(work):
        done = folder / f"done-{number}"
        if done.exists():
            continue
        if again in command and not again.exists():
            shutil.copytree(store, again)
        begun = command[0] == "train" and (command[2] / "checkpoints").exists()
        called([*command, "--resume"] if begun else command, seconds)
        done.touch()
    for name, (where, which, more) in looks.items():
        called(["evaluate", where, which, "--split", "test", "--vae", "tiny", *more], seconds)
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
    for name, method, of in (
        ("model_mean", "model", "mean"),
        ("model_sample", "model", "sample"),
        ("shipped_refined", "refined", "shipped"),
        ("shipped_mean", "model", "shipped"),
        ("shipped_sample", "model", "shipped_sample"),
        ("shipped_textured", "model", "shipped_textured"),
        ("model_plain", "model", "plain"),
        ("regression_longer", "regression", "longer"),
    ):
        if of in documents:
            methods[name] = documents[of]["methods"][method]

    def by_method(figure: str, digits: int) -> dict[str, float]:
        return {n: round(methods[n][figure], digits) for n in METHODS if methods.get(n, {}).get(figure) is not None}

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
        "noise_ratio": by_method("noise_ratio", 3),
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
    for figure in ("roughness_ratio", "noise_ratio"):
        rows = [one[figure] for one in each.values()]
        found[figure] = stated(rows, 3)
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
