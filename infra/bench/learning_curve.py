"""What another patient brings: the shipped recipe on one, two, three and four patients, scored on a chest it never saw.

    python infra/bench/learning_curve.py DATA [--work FOLDER] [--real FOLDER] [--steps 400] [--width 16] [--seeds 0,1]

DATA is the folder of `infra/train_pretrained.py`. Every run has the same network, steps and seed; only the patients
differ: each set holds the one before it and one more, and the last adds the synthetic chests. The network is smaller
than the shipped one and trained for less long, so that all runs take an hour of one core: what counts is how the gain
grows along a row. Scored as in `pretrained.py` after consistency: PSNR over [-1000, 1000] HU above cubic, on a human
chest (1.5 mm) averaged to 5 mm by a box and by a profile that training never draws. Runs are kept in --work and taken
up there. Prints a table, then one JSON object, also kept in infra/bench/results/ (not with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from pretrained import cases, scores

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "infra"))

import train_pretrained as recipe_of

from pipeline.refiner import load_pretrained

ORDER = ("tcia_rider_pilot_0117_ctpe", "tcia_lungfcp_0001", "vhm_head", "vhf_head")
"""Patients as they join: the chests first, which are nearest to what is scored."""
CASES = ("chest, 5 mm box", "chest, 5 mm new")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("learning-curve"))
    parser.add_argument(
        "--real",
        type=Path,
        default=Path(os.environ.get("CTPIPE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real"),
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--head", type=int, default=8)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--sets", default="1,2,3,4,4 and phantoms", help="how many patients, by comma")
    parser.add_argument("--chest-slices", type=int, default=80)
    parser.add_argument("--quick", action="store_true", help="ten steps: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.steps = 10
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    sets = {str(n): ORDER[:n] for n in range(1, len(ORDER) + 1)} | {"4 and phantoms": ORDER}
    sets = {name: sets[name] for name in options.sets.split(",")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sets}
    for seed in options.seeds.split(","):
        for name, patients in sets.items():
            found[name].append(gains(name, patients, int(seed), options))
            print(f"seed {seed}, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    report(found, options)


def gains(name: str, patients: tuple[str, ...], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """dB above cubic by case, of a network trained on these patients."""
    work = options.work / f"{name.replace(' ', '-')}-seed-{seed}"
    kept = work / "gains.json"
    if kept.exists():
        held: dict[str, float] = json.loads(kept.read_text())
        return held
    phantoms = name.endswith("phantoms")
    recipe = recipe_of.Recipe(
        width=options.width,
        blocks=options.blocks,
        head=options.head,
        seed=seed,
        phantoms=10 if phantoms else 0,
        start_patches=20,
    )
    settings = argparse.Namespace(
        data=options.data,
        work=work,
        out=work / "refiner.safetensors",
        name=name,
        steps=options.steps,
        stop_after=float("inf"),
        export_only=False,
        hold_out=",".join(one for one in ORDER if one not in patients),
        device="cpu",
    )
    recipe_of.train(settings, recipe)
    model = load_pretrained(str(settings.out))
    wanted = argparse.Namespace(real=options.real, chest_slices=options.chest_slices, quick=False)
    made = cases(wanted)
    result = {}
    for case in CASES:
        rows = scores(made[case](), {"curve": model}, 1)
        result[case] = round(rows["curve consistent"]["psnr_db"] - rows["cubic"]["psnr_db"], 3)
    kept.write_text(json.dumps(result) + "\n")
    return result


def report(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """Table and JSON."""
    rows: dict[str, Any] = {}
    for name, runs in found.items():
        rows[name] = {case: round(statistics.mean(run[case] for run in runs), 3) for case in CASES}
        rows[name] |= {f"{case}, by seed": [run[case] for run in runs] for case in CASES}
        print(f"{name:<16}" + "  ".join(f"{case} {rows[name][case]:+.2f} dB" for case in CASES))
    result = {
        "bench": "learning_curve",
        "gain_over_cubic_db": rows,
        "settings": {k: v for k, v in vars(options).items() if k in ("steps", "width", "blocks", "head", "seeds")},
        "patients_in_order": ORDER,
        "device": f"cpu, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    if not options.quick:
        out = Path(__file__).parent / "results" / "learning_curve-cpu.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
