"""The pixel-space refiner on held-out phantoms: what it adds to interpolation, and under an operator it never saw.

    python infra/bench/refiner.py [--quick] [--steps 400] [--size 96] [--patients 6] [--held-out 3]

The refiner learns on phantom patients without a diffusion model: its input is the interpolated thick series alone.
Scores are PSNR in the window [-160, 240] HU against the noisy thin series, mean over held-out patients, once with the
thick series as scanned and once with one simulated by the slice profile that training never draws (a box blurred by
3 mm). ``consistent`` is projected onto the thick slices as ``ctpipe interpolate`` does. The VAE's ceiling is the round
trip of the thin series itself. Prints a table, then one JSON object, which is also kept in infra/bench/results/ (not
with --quick).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cli.train_refiner import PatchStream, squared_error
from diffusion.config import BudgetConfig, OptimiserConfig, ValidationConfig
from diffusion.loop import Trainer
from diffusion.loop_interface import LoopConfig
from pipeline.compose import ComposeSettings, compose, interpolated
from pipeline.evaluate import common_slices
from pipeline.hu import Window
from pipeline.metrics import psnr
from pipeline.phantom import make_patient
from pipeline.refiner import Refiner, RefinerCard, RefinerConfig, RefinerFile, save_refiner
from pipeline.refiner_data import PatchSettings, RefinerCase, RefinerPatches, held_out_operator
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.vae import load_vae
from pipeline.volume import Volume

WINDOW = Window()


@dataclass(frozen=True)
class Scored:
    """A thick series to start from, the profile that composition is told, and the truth."""

    thick: Volume
    thin: Volume
    profile: SliceProfile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small phantoms, a few seconds: shows that it runs")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 4 patches")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--patients", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=2)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.size, options.slices, options.patients, options.held_out = 8, 32, 40, 2, 1
    training = {f"{seed}": phantom_case(seed, options) for seed in range(options.patients)}
    held_out = [phantom_case(10_000 + seed, options) for seed in range(options.held_out)]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.process_time()
        file, loss = train(training, Path(folder), options)
        cpu_seconds = round(time.process_time() - begin, 1)
        table = {name: scores(list(map(view, held_out)), file) for name, view in (("scanned", scanned), ("new", new))}
    table["scanned"]["vae_ceiling"] = ceiling(held_out)
    for name in sorted({method for row in table.values() for method in row}):
        cells = "  ".join(f"{k} {row[name]:6.2f} dB" if name in row else " " * 16 for k, row in table.items())
        print(f"  {name:32} {cells}")
    found = {
        "psnr_db": table,
        "gain_over_cubic_db": {k: round(row["refined_consistent"] - row["cubic"], 3) for k, row in table.items()},
        "loss": loss,
        "training_cpu_seconds": cpu_seconds,
        "settings": {k: v for k, v in vars(options).items() if k != "quick"},
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {"torch": version("torch"), "python": platform.python_version()},
    }
    if not options.quick:
        out = Path(__file__).parent / "results" / "refiner-cpu.json"
        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))


def phantom_case(seed: int, options: argparse.Namespace) -> RefinerCase:
    """A phantom patient, its thin slices inside the thick extent."""
    patient = make_patient(seed, options.size, options.slices, "APE" if seed % 2 else "non-APE")
    inside = common_slices(patient.thick.geometry, patient.thin.geometry)
    target = patient.thin.geometry.with_z(np.asarray(patient.thin.geometry.z_mm)[inside])
    return RefinerCase(str(seed), Volume(patient.thin.hu[inside], target), patient.thick)


def train(cases: dict[str, RefinerCase], folder: Path, options: argparse.Namespace) -> tuple[RefinerFile, float]:
    """Train and save; the file and the last step's loss."""
    torch.manual_seed(0)
    config = RefinerConfig(options.width, options.blocks)
    network = Refiner(config)
    patch = (12, min(48, options.size), min(48, options.size))
    stream = PatchStream(RefinerPatches(list(cases), cases.__getitem__, WINDOW, PatchSettings(patch, held=len(cases))))
    rate = OptimiserConfig(
        learning_rate=2e-3, warmup_steps=20, steps=options.steps, samples_per_step=4, weight_decay=0.0
    )
    settings = LoopConfig(rate, ValidationConfig(every_epochs=0), BudgetConfig(checkpoint_every_steps=options.steps))
    trainer = Trainer(network, squared_error, stream, settings, folder)
    summary = trainer.run()
    with trainer.averaged_weights():
        card = RefinerCard(config, (WINDOW.center, WINDOW.width), (1.0, 1.0), "none", {"steps": summary.steps})
        return save_refiner(network, card, folder / "refiner.safetensors"), round(summary.loss, 6)


def scanned(case: RefinerCase) -> Scored:
    """The thick series as the scanner gave it."""
    return Scored(case.thick, case.thin, SliceProfile("box", case.thick.geometry.thickness_mm))


def new(case: RefinerCase) -> Scored:
    """A thick series simulated by the operator that training never draws."""
    thin_z = np.asarray(case.thin.geometry.z_mm)
    profile, thick_z = held_out_operator(thin_z, case.thick.geometry.thickness_mm)
    hu = np.rint(slice_operator(profile, thick_z, thin_z).apply(case.thin.hu)).astype(np.int16)
    at = replace(case.thin.geometry.with_z(thick_z), thickness_mm=case.thick.geometry.thickness_mm)
    return Scored(Volume(hu, at), case.thin, profile)


def scores(cases: list[Scored], file: RefinerFile) -> dict[str, float]:
    """Mean PSNR of every way to fill the gaps."""
    rows: list[dict[str, float]] = []
    for case in cases:
        target = case.thin.geometry
        base = interpolated(case.thick, target, "cubic")
        ways = {"cubic": base, "linear": interpolated(case.thick, target, "linear")}
        for name, refiner, consistent in (
            ("cubic_consistent", None, True),
            ("refined", file, False),
            ("refined_consistent", file, True),
        ):
            how = ComposeSettings("absolute", consistent, case.profile, refiner=refiner)
            ways[name] = compose(base, WINDOW, case.thick, target, how)[0].astype(np.float32)
        rows.append({name: in_window(volume, case.thin.hu) for name, volume in ways.items()})
    return {name: round(float(np.mean([row[name] for row in rows])), 3) for name in rows[0]}


def ceiling(cases: list[RefinerCase]) -> float:
    """Mean PSNR of the thin series' own round trip through the tiny VAE."""
    vae = load_vae("tiny")
    found = []
    for case in cases:
        unit: Any = WINDOW.to_unit(case.thin.hu)
        back = np.asarray(vae.decode(vae.encode(unit), case.thin.geometry.shape_zyx))
        found.append(in_window(WINDOW.from_unit(back), case.thin.hu))
    return round(float(np.mean(found)), 3)


def in_window(volume: NDArray[Any], truth: NDArray[Any]) -> float:
    """PSNR over the window's width, both clipped to it."""
    clipped = [np.clip(v.astype(np.float32), WINDOW.lower, WINDOW.upper) for v in (volume, truth)]
    return psnr(clipped[0], clipped[1], data_range=WINDOW.width)


if __name__ == "__main__":
    main()
