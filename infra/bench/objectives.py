"""Objectives under one CPU budget: each trains the tiny U-Net on phantoms and interpolates phantoms it never saw.

    python infra/bench/objectives.py [--quick] [--steps 400] [--keep FOLDER] [--only bridge,flow] [--score val]

Phantom patients go through the tiny VAE in pixel alignment into a LatentStore; the trainer itself trains on it, the
averaged weights generate. Every objective gets the same optimiser steps of the same network on the same windows, so
equal arithmetic; the CPU seconds that this took are in the table. Settings were chosen on the validation patients
(``--score val``); the table is of the test patients. PSNR is in the window [-160, 240] HU over the scanned overlap,
mean over the patients, beside decode(linear), which an untrained bridge gives, and the VAE's ceiling; ``detail`` is
linear + decode(prediction) - decode(linear), which is what `ctpipe decode` writes.

Everything is kept in ``--keep`` as it is finished: a run that is repeated goes on, several processes may share the
work by ``--only``, and ``--session`` ends a process after so many seconds with exit code 75, to be started again (the
trainer resumes to the bit). Prints a table, then one JSON object, which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from phantom_cases import Case, decode, load_case, make_store, psnr

from diffusion.config import load_config
from diffusion.objectives import OBJECTIVES
from diffusion.runs import RunCard
from diffusion.sampling import Interpolator
from diffusion.training import train
from latentcache import LatentStore
from pipeline.vae import Vae, load_vae

STARTED, TRY_AGAIN = time.perf_counter(), 75
SETTINGS = ["validation.every_epochs=0", "budget.max_seconds=null", "budget.log_every_steps=50",
            "budget.checkpoint_every_steps=1000000", "optimiser.schedule=cosine",
            "optimiser.learning_rate=2e-3", "model.told=false"]  # fmt: skip
STEPS: dict[str, tuple[int, ...]] = {"bridge": (1, 10)}
"""Sampler steps that are tried, the first for the headline; samples of noise objectives need several."""
NOISE_STEPS = (10,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small phantoms, few steps: shows that it runs, no more")
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of each objective")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--slices", type=int, default=96)
    parser.add_argument("--patients", type=int, default=40, help="to train on")
    parser.add_argument("--held-out", type=int, default=3, help="to score on")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--score", choices=("val", "test"), default="test", help="val: to choose settings by")
    parser.add_argument("--only", default=",".join(OBJECTIVES), help="objectives, comma separated")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the training, as for `ctpipe train`")
    parser.add_argument("--keep", type=Path, help="folder for encoded phantoms and finished rows")
    parser.add_argument("--session", type=float, help="seconds after which this process ends, to be started again")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.size, options.slices, options.patients, options.held_out = 6, 32, 40, 2, 1
        options.samples = 2
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        run_all(options, options.keep or Path(scratch))


def run_all(options: argparse.Namespace, keep: Path) -> None:
    """Every objective asked for, each kept as soon as it is done."""
    vae = load_vae("tiny")
    keep.mkdir(parents=True, exist_ok=True)
    grid = (options.size, options.slices)
    held_out = [load_case(keep, vae, options.score, n, *grid) for n in range(options.held_out)]
    given = [decoded_condition(vae, case, keep, n, options) for n, case in enumerate(held_out)]
    references = references_of(vae, held_out, given, keep, options)
    for name, value in references.items():
        print(f"  {name:14} {value:6.2f} dB", flush=True)
    table = {}
    for name in options.only.split(","):
        row = Row(name, keep, options)
        row.train(vae, lambda: [load_case(keep, vae, "train", n, *grid) for n in range(options.patients)])
        row.score(vae, held_out, given)
        table[name] = row.table()
        for steps, scores in table[name]["by_inference_steps"].items():
            print(
                f"  {name:8} {steps:>3} sampler steps   one sample {scores['one_sample_db']:6.2f}   mean of "
                f"{options.samples} {scores['mean_of_samples_db']:6.2f} dB   over decode(linear) "
                f"{scores['mean_of_samples_db'] - references['decode_linear']:+.2f} dB   as detail over linear "
                f"{scores['mean_of_samples_detail_db'] - references['linear']:+.2f} dB   "
                f"({table[name]['cpu_seconds']:.0f} CPU s)",
                flush=True,
            )
    report(options, references, table)


class Row:
    """What is known of one objective so far, kept in a file: training first, then a score a patient and setting."""

    def __init__(self, name: str, folder: Path, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        overrides = [*SETTINGS, f"optimiser.steps={options.steps}", *options.set, f"objective.name={name}"]
        self.config, _ = load_config("tiny", None, overrides)
        asked = [str(self.config), options.score, options.samples, options.size, options.slices, options.patients]
        self.folder = folder / f"{name}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "row.json"
        self.state: dict[str, Any] = {"cpu_seconds": 0.0, "training": None, "scores": {}}
        if self.path.exists():
            self.state = json.loads(self.path.read_text())

    def save(self) -> None:
        aside = self.path.with_suffix(".aside")
        aside.write_text(json.dumps(self.state, indent=1))
        aside.rename(self.path)

    def train(self, vae: Vae, training: Callable[[], list[Case]]) -> None:
        """Train, or go on training, within what is left of the session."""
        if self.state["training"] is not None:
            return
        run, place = self.folder / "run", self.folder / "store"
        begun = (run / "checkpoints" / "last").exists()
        if not begun:
            shutil.rmtree(run, ignore_errors=True)
            shutil.rmtree(place, ignore_errors=True)
            make_store(place, training(), vae)
        budget = replace(
            self.config.budget, max_seconds=None if self.options.session is None else time_left(self.options)
        )
        cpu = time.process_time()
        summary = train(LatentStore.open(place), run, replace(self.config, budget=budget), resume=begun)
        self.state["cpu_seconds"] += time.process_time() - cpu
        if summary.stopped_by == "finished":
            settings = RunCard.read(run).build_objective().settings()
            self.state["training"] = {"steps": summary.steps, "loss": round(summary.loss, 4), "settings": settings}
        self.save()
        end_of_session(self.options, summary.stopped_by != "finished")

    def score(self, vae: Vae, cases: list[Case], given: list[NDArray[np.float32]]) -> None:
        """Sample and decode what has not been scored yet."""
        model = Interpolator.load(self.folder / "run", which="last")
        for number, case in enumerate(cases):
            keys = {steps: f"{steps}/{number}" for steps in STEPS.get(self.name, NOISE_STEPS)}
            todo = {steps: key for steps, key in keys.items() if key not in self.state["scores"]}
            for steps, key in todo.items():
                drawn = model.generate_samples(case.condition, self.options.samples, num_inference_steps=steps, seed=1)
                scores = {}
                for what, latent in (("one_sample", drawn[0]), ("mean_of_samples", drawn.mean(0))):
                    volume = decode(vae, latent, case)
                    scores[f"{what}_db"] = psnr(volume, case)
                    scores[f"{what}_detail_db"] = psnr(case.linear + volume - given[number], case)
                    scores[f"{what}_latent_gain_db"] = latent_gain(latent, case, model.std)
                self.state["scores"][key] = scores
                self.save()
                end_of_session(self.options)

    def table(self) -> dict[str, Any]:
        """The row as it is reported: the mean over the patients."""
        by_steps: dict[str, list[dict[str, float]]] = {}
        for key, scores in self.state["scores"].items():
            by_steps.setdefault(key.split("/")[0], []).append(scores)
        means = {
            steps: {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0]}
            for steps, rows in by_steps.items()
        }
        return {
            **self.state["training"],
            "cpu_seconds": round(self.state["cpu_seconds"], 1),
            "by_inference_steps": means,
        }


def time_left(options: argparse.Namespace) -> float:
    """Seconds of this session that are left, at least one."""
    return max(1.0, float(options.session) - (time.perf_counter() - STARTED))


def end_of_session(options: argparse.Namespace, surely: bool = False) -> None:
    """End the process where its time is up; what it did is kept."""
    if surely or (options.session is not None and time_left(options) <= 1.0):
        raise SystemExit(TRY_AGAIN)


def latent_gain(predicted: NDArray[np.float32], case: Case, std: list[float]) -> float:
    """How much closer than the condition the prediction is to the thin latent, dB, channels whitened."""
    scale = np.asarray(std, dtype=np.float32)[:, None, None, None]
    before = np.square((case.condition - case.thin_latent) / scale).mean()
    return 10 * math.log10(float(before / np.square((predicted - case.thin_latent) / scale).mean()))


def decoded_condition(
    vae: Vae, case: Case, keep: Path, number: int, options: argparse.Namespace
) -> NDArray[np.float32]:
    """decode(linear) of a held-out patient, kept."""
    path = keep / "cases" / f"{options.score}-{number}-{options.size}-{options.slices}-{vae.sha256[:8]}.decoded.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.npy")
        np.save(aside, decode(vae, case.condition, case))
        aside.rename(path)
    decoded: NDArray[np.float32] = np.load(path)
    return decoded


def references_of(
    vae: Vae, cases: list[Case], given: list[NDArray[np.float32]], keep: Path, options: argparse.Namespace
) -> dict[str, float]:
    """Mean PSNR of what bounds the objectives; kept."""
    path = keep / f"references-{options.score}-{options.size}-{options.slices}-{len(cases)}.json"
    if not path.exists():
        rows = [
            {
                "linear": psnr(case.linear, case),
                "decode_linear": psnr(volume, case),
                "vae_ceiling": psnr(decode(vae, case.thin_latent, case), case),
            }
            for case, volume in zip(cases, given, strict=True)
        ]
        path.write_text(json.dumps({name: float(np.mean([row[name] for row in rows])) for name in rows[0]}))
    kept: dict[str, float] = json.loads(path.read_text())
    return kept


def report(options: argparse.Namespace, references: dict[str, float], table: dict[str, dict[str, Any]]) -> None:
    """The JSON line, kept where all objectives ran on the test patients in full."""
    base = references["decode_linear"]
    headline = {name: next(iter(row["by_inference_steps"].values())) for name, row in table.items()}
    result = {
        "bench": "objectives",
        "psnr_db": {k: round(v, 3) for k, v in references.items()},
        "objectives": table,
        "gain_over_decode_linear_db": {n: round(s["mean_of_samples_db"] - base, 3) for n, s in headline.items()},
        "overrides": options.set,
        "size": options.size,
        "slices": options.slices,
        "patients": options.patients,
        "held_out": options.held_out,
        "samples": options.samples,
        "threads": options.threads,
        "score": options.score,
        "quick": options.quick,
        "device": f"{platform.machine()} {os.cpu_count()} cpu",
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }
    if not options.quick and options.score == "test" and set(table) == set(OBJECTIVES):
        target = Path(__file__).parent / "results" / "objectives-cpu.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
