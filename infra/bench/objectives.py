"""Objectives under one CPU budget: each trains the tiny U-Net on phantoms and interpolates held-out ones.

    python infra/bench/objectives.py [--quick] [--seconds 150] [--size 96] [--patients 6] [--held-out 2]

Phantom patients are encoded by the tiny VAE in pixel alignment. Every objective gets equal CPU seconds (process time,
so that a busy machine changes nothing but the wait), the same batches, learning rate and average. PSNR is in the window
[-160, 240] HU over the scanned overlap, mean over the held-out patients, beside decode(condition) - what an untrained
bridge gives -, linear interpolation of the HU, and the VAE's ceiling. Prints a table, then one JSON object, which is
also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.model import Interpolator
from diffusion.model_config import model_preset
from diffusion.objective import OBJECTIVES, build_objective
from diffusion.unet import UNet, build_unet
from pipeline.hu import Window
from pipeline.phantom import make_patient
from pipeline.resample import resample_z
from pipeline.vae import Vae, load_vae

WINDOW = Window()
DEPTH, BATCH, LEARNING_RATE, AVERAGE = 8, 4, 1e-3, 0.99
STEPS = {"epsilon": 20, "v": 20, "flow": 20, "bridge": None}


@dataclass(frozen=True)
class Case:
    """One patient: the thin volume and its linear interpolation in [-1, 1], and both encoded, raw."""

    thin: np.ndarray[Any, Any]
    linear: np.ndarray[Any, Any]
    thin_latent: Tensor
    condition: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small phantoms, 4 s each: shows that it runs, no more")
    parser.add_argument("--seconds", type=float, default=150.0, help="CPU seconds of training for each objective")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--slices", type=int, default=64)
    parser.add_argument("--patients", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.size, options.slices, options.patients, options.held_out = 4.0, 32, 40, 2, 1
        options.samples = 2
    vae = load_vae("tiny")
    count = options.patients + options.held_out
    cases = [make_case(vae, seed, options.size, options.slices) for seed in range(count)]
    training, held_out = cases[: options.patients], cases[options.patients :]
    stacked = torch.cat([case.thin_latent.flatten(1) for case in training], dim=1)
    mean, std = stacked.mean(1).tolist(), stacked.std(1).tolist()
    references = {
        "linear interpolation": average_psnr(held_out, lambda case: case.linear),
        "decode(condition)": average_psnr(held_out, lambda case: decode(vae, case.condition, case)),
        "VAE ceiling": average_psnr(held_out, lambda case: decode(vae, case.thin_latent, case)),
    }
    for name, value in references.items():
        print(f"  {name:24} {value:6.2f} dB", flush=True)
    table = {}
    for name in OBJECTIVES:
        table[name] = one_objective(name, vae, training, held_out, mean, std, options)
        row = table[name]
        print(
            f"  {name:10} {row['steps']:5d} steps   one sample {row['one_sample']:6.2f} dB   "
            f"mean of {options.samples} {row['mean_of_samples']:6.2f} dB   "
            f"over decode(condition) {row['mean_of_samples'] - references['decode(condition)']:+.2f} dB   "
            f"in latents {row['latent_gain_one_sample']:+.2f} / {row['latent_gain_mean_of_samples']:+.2f} dB",
            flush=True,
        )
    report(options, references, table)


def make_case(vae: Vae, seed: int, size: int, slices: int) -> Case:
    """A phantom, cropped to what the thick series covers so that nothing is extrapolated."""
    patient = make_patient(seed, size, slices, "APE" if seed % 2 else "non-APE")
    z_thin, z_thick = np.asarray(patient.thin.geometry.z_mm), np.asarray(patient.thick.geometry.z_mm)
    inside = (z_thin >= z_thick[0] - 2.5) & (z_thin <= z_thick[-1] + 2.5)
    first = int(np.argmax(inside))
    last = first + int(inside.sum()) // 4 * 4
    thin = WINDOW.to_unit(patient.thin.hu[first:last])
    linear = WINDOW.to_unit(resample_z(patient.thick.hu, z_thick, z_thin[first:last]))
    return Case(thin, linear, vae.encode(thin), vae.encode(linear))


def one_objective(
    name: str,
    vae: Vae,
    training: list[Case],
    held_out: list[Case],
    mean: list[float],
    std: list[float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Trains one objective from the same start on the same batches and scores it."""
    shape = (-1, 1, 1, 1)
    whitened = [
        tuple((x - torch.tensor(mean).reshape(shape)) / torch.tensor(std).reshape(shape) for x in pair)
        for pair in ((case.thin_latent, case.condition) for case in training)
    ]
    residual = torch.cat([(clean - condition).flatten() for clean, condition in whitened])
    objective = build_objective(name, residual_std=float(residual.std()))
    torch.manual_seed(0)
    model = build_unet(model_preset("tiny")).train()
    averaged = copy.deepcopy(model)
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    rng = np.random.default_rng(0)
    started, wall, steps = time.process_time(), time.perf_counter(), 0
    while time.process_time() - started < options.seconds:
        clean, condition = batch(whitened, rng)
        generators = [torch.Generator().manual_seed(steps * BATCH + b) for b in range(BATCH)]
        terms = objective.loss(model, clean, condition, torch.ones_like(clean[:, :1]), generators)
        optimiser.zero_grad()
        terms.per_sample.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        steps += 1
        update_average(averaged, model, steps)
    spent = time.process_time() - started
    interpolator = Interpolator.from_parts(averaged, objective, mean, std, depth_window=DEPTH)
    drawn = {
        count: [
            interpolator.generate(case.condition, samples=count, num_inference_steps=STEPS[name], seed=1)
            for case in held_out
        ]
        for count in (1, options.samples)
    }
    decoded = {count: decoded_psnr(vae, latents, held_out) for count, latents in drawn.items()}
    gains = {count: latent_gain(latents, held_out, std) for count, latents in drawn.items()}
    return {
        "steps": steps,
        "cpu_seconds": round(spent, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "inference_steps": STEPS[name] or objective.default_steps,
        "one_sample": round(decoded[1], 3),
        "mean_of_samples": round(decoded[options.samples], 3),
        "latent_gain_one_sample": round(gains[1], 3),
        "latent_gain_mean_of_samples": round(gains[options.samples], 3),
        "settings": objective.settings(),
    }


def decoded_psnr(vae: Vae, latents: list[np.ndarray[Any, Any]], cases: list[Case]) -> float:
    """Mean PSNR of decoded predictions, dB over the window."""
    pairs = zip(latents, cases, strict=True)
    return float(np.mean([psnr(decode(vae, torch.from_numpy(x), case), case.thin) for x, case in pairs]))


def latent_gain(latents: list[np.ndarray[Any, Any]], cases: list[Case], std: list[float]) -> float:
    """How much closer than the condition the predictions are to the thin latents, dB, channels whitened."""
    scale = np.asarray(std, dtype=np.float32)[:, None, None, None]
    gains = []
    for predicted, case in zip(latents, cases, strict=True):
        wanted = case.thin_latent.numpy()
        before = np.square((case.condition.numpy() - wanted) / scale).mean()
        gains.append(10 * math.log10(float(before / np.square((predicted - wanted) / scale).mean())))
    return float(np.mean(gains))


def batch(whitened: list[tuple[Tensor, ...]], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of random patients, equally deep."""
    chosen = []
    depth = min(DEPTH, *(clean.shape[1] for clean, _ in whitened))
    for _ in range(BATCH):
        clean, condition = whitened[rng.integers(len(whitened))]
        start = int(rng.integers(clean.shape[1] - depth + 1))
        chosen.append((clean[:, start : start + depth], condition[:, start : start + depth]))
    return torch.stack([c for c, _ in chosen]), torch.stack([c for _, c in chosen])


@torch.no_grad()
def update_average(averaged: UNet, model: UNet, steps: int) -> None:
    """Exponential moving average, short at the start."""
    keep = min(AVERAGE, 1 - 1 / steps)
    for slow, fast in zip(averaged.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - keep)


def decode(vae: Vae, latent: Tensor, case: Case) -> np.ndarray[Any, Any]:
    """The latent's volume in [-1, 1]."""
    return vae.decode(latent, case.thin.shape).numpy()  # type: ignore[arg-type]


def average_psnr(cases: list[Case], predict: Any) -> float:
    """Mean over the patients, dB over the window."""
    return float(np.mean([psnr(predict(case), case.thin) for case in cases]))


def psnr(predicted: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Of volumes in [-1, 1], dB."""
    return 10 * math.log10(4 / float(np.square(np.clip(predicted, -1, 1) - wanted).mean()))


def report(options: argparse.Namespace, references: dict[str, float], table: dict[str, dict[str, Any]]) -> None:
    """The JSON line, kept unless --quick."""
    base = references["decode(condition)"]
    result = {
        "bench": "objectives",
        "psnr": {k: round(v, 3) for k, v in references.items()},
        "objectives": table,
        "gain_over_condition": {name: round(row["mean_of_samples"] - base, 3) for name, row in table.items()},
        "size": options.size,
        "slices": options.slices,
        "patients": options.patients,
        "held_out": options.held_out,
        "samples": options.samples,
        "threads": torch.get_num_threads(),
        "quick": options.quick,
        "device": platform.machine() + f"-{os.cpu_count()}cpu",
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }
    if not options.quick:
        target = Path(__file__).parent / "results" / f"objectives-{result['device']}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
