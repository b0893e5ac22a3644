"""The U-Net's training step on a GPU: seconds, MFU, memory and data wait at full volume sizes; and whether it learns.

    python infra/bench/unet_gpu.py [--quick] [--steps 8] [--variants eager,compiled,...] [--latents FOLDER]
    python infra/bench/unet_gpu.py --export STORE FOLDER      on the machine that has the store

Needs torch and numpy alone, so that it runs on a bare GPU machine. Preset ``medium`` on whole latents 75x64x64 and
75x128x128 (a 300-slice volume at latent patch 2, and at patch 1), batch 1 and 2, read from .npy files ahead of the
step; bf16 autocast, channels last, fused AdamW. A step is the objective's loss, backward, clipping and the update. MFU
is 3 x forward FLOP over the step's time and the bf16 matmul rate measured in the same run; recomputation is no useful
work. Variants that do not fit are reported as such. With ``--latents`` the model then trains for ``--seconds`` on real
latents (`thin-N.npy` and `condition-N.npy`, as ``--export`` writes them) and is scored on the last pairs, which it
never saw: how much closer than the condition it comes, in dB, after one network call.

Without a GPU it runs preset ``tiny`` on small latents, to show that the script itself works, and keeps nothing.
Prints a table, then one JSON object, which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import npy_latents
from npy_latents import Latents, Pair, Shape

from diffusion.networks import UNet, UNetConfig, build_unet, model_preset, parameter_count
from diffusion.objectives import build_objective
from diffusion.runs import PowerEma
from diffusion.sampling import DepthWindows
from diffusion.training import count_forward, measured_matmul_rate

VARIANTS = {
    "eager": (False, False),
    "compiled": (True, False),
    "checkpointed": (False, True),
    "compiled+checkpointed": (True, True),
}
"""Name: (torch.compile, activation checkpointing)."""
PATIENTS_AN_EPOCH = 267


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="eager and compiled+checkpointed, 3 steps each")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variants", default=",".join(VARIANTS), help="comma separated; " + ", ".join(VARIANTS))
    parser.add_argument("--latents", type=Path, help="folder of real latents to train on afterwards")
    parser.add_argument("--seconds", type=float, default=240.0, help="of that training")
    parser.add_argument("--held-out", type=int, default=4, help="pairs of that folder that are scored on")
    parser.add_argument("--export", nargs=2, metavar=("STORE", "FOLDER"), help="write a store's pairs as .npy and end")
    options = parser.parse_args()
    if options.export:
        npy_latents.export(options.export[0], Path(options.export[1]))
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    variants = options.variants.split(",") if on_gpu else ["eager", "checkpointed"]
    if options.quick:
        options.steps, variants = 3, [v for v in variants if v in ("eager", "compiled+checkpointed")]
    config = model_preset("medium" if on_gpu else "tiny")
    shapes: list[Shape] = [(75, 64, 64), (75, 128, 128)] if on_gpu else [(8, 16, 16)]
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    rate = matmul_rate(device)
    print(f"{name}: {rate / 1e12:.2f} TFLOP/s in matrix products; {parameter_count(config) / 1e6:.1f}M parameters")
    rows = []
    for shape in shapes:
        for batch in (1, 2):
            for variant in variants:
                rows.append(measure(config, shape, batch, variant, device, options.steps, rate))
                print_row(rows[-1])
    learned = None
    if options.latents:
        learned = learn(config, options.latents, options.held_out, device, options.seconds)
        print(", ".join(f"{key} {value}" for key, value in learned.items()))
    report(name, rate, config, rows, learned, keep=on_gpu and not options.quick)


def matmul_rate(device: torch.device) -> float:
    return measured_matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def measure(
    config: UNetConfig,
    shape: Shape,
    batch: int,
    variant: str,
    device: torch.device,
    steps: int,
    rate: float | None = None,
) -> dict[str, Any]:
    """One variant on made-up latents of one shape: warm up (compilation included), then the mean of the steps."""
    compiled, checkpointed = VARIANTS[variant]
    row: dict[str, Any] = {"variant": variant, "shape": list(shape), "batch": batch}
    rate = rate or matmul_rate(device)
    flops = count_forward(config, 1, shape, device.type == "cuda")[1]
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory() as folder:
            latents = Latents.make_up(Path(folder), shape)
            model = new_model(replace(config, activation_checkpointing=checkpointed), device, compiled)
            timed = train(model, latents.batches(batch, device, shape[0]), device)
            warm_up = next(timed) + next(timed)
            seconds, waited = (sum(x) / steps for x in zip(*(next(timed) for _ in range(steps)), strict=True))
            timed.close()
    except torch.OutOfMemoryError:
        return {**row, "step_s": None, "note": "out of memory"}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {
        **row,
        "step_s": round(seconds, 4),
        "first_two_steps_s": round(warm_up[0] + warm_up[2], 2),
        "mfu": round(3 * flops * batch / seconds / rate, 4),
        "forward_tflop_per_sample": round(flops / 1e12, 3),
        "peak_gib": round(peak / 2**30, 2),
        "data_wait": round(waited / seconds, 5),
        "epoch_s": round(PATIENTS_AN_EPOCH / batch * seconds, 1),
    }


def new_model(config: UNetConfig, device: torch.device, compiled: bool) -> UNet:
    torch.manual_seed(0)
    model = build_unet(config).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if compiled:
        model.compile()
    return model


def train(
    model: UNet,
    pairs: Iterator[Pair],
    device: torch.device,
    learning_rate: Callable[[int], float] = lambda step: 1e-4,
    ema: PowerEma | None = None,
    residual_std: float = 0.5,
) -> Iterator[tuple[float, float]]:
    """Training steps without end; yields (seconds, seconds spent waiting for data) of each."""
    on_gpu = device.type == "cuda"
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, betas=(0.9, 0.99), fused=on_gpu)
    objective = build_objective("bridge", residual_std=residual_std)
    for step in count():
        begin = time.perf_counter()
        read = next(pairs)
        waited = time.perf_counter() - begin
        thin, condition = (x.to(device, non_blocking=True) for x in read)
        optimiser.param_groups[0]["lr"] = learning_rate(step)
        random = [torch.Generator(device).manual_seed(step * len(thin) + b) for b in range(len(thin))]
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = objective.loss(model, thin, condition, torch.ones_like(thin[:, :1]), random).per_sample.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(step + 1)
        if not torch.isfinite(loss):
            raise SystemExit("the loss is not finite")
        yield time.perf_counter() - begin, waited


def learn(config: UNetConfig, folder: Path, held_out: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """A short training on real latents, windows of 8, batch 4; scored on pairs that it never saw."""
    latents = Latents(folder, held_out)
    tensors = [latents.read(pair, slice(None)) for pair in latents.training[:16]]
    residual = math.sqrt(float(np.mean([(thin - condition).square().mean() for thin, condition in tensors])))
    model = new_model(config, device, compiled=False)
    ema = PowerEma(model, 0.1)
    begin, steps = time.perf_counter(), 0
    rate = partial(warm_up, 2e-4 if config.width > 100 else 2e-3)
    for _ in train(model, latents.batches(4, device, 8), device, rate, ema, residual):
        steps += 1
        if time.perf_counter() - begin > seconds:
            break
    spent = time.perf_counter() - begin
    ema.swap()
    gains = [gain(model, latents.read(pair, slice(None)), residual, device) for pair in latents.held_out]
    return {
        "training_pairs": len(latents.training),
        "held_out_pairs": len(latents.held_out),
        "steps": steps,
        "seconds": round(spent, 1),
        "step_s": round(spent / steps, 4),
        "held_out_gain_db": round(float(np.mean(gains)), 3),
        "held_out_gains_db": [round(g, 2) for g in gains],
    }


def warm_up(rate: float, step: int) -> float:
    return rate * min(1.0, (step + 1) / 50)


@torch.no_grad()
def gain(model: UNet, pair: list[Tensor], residual_std: float, device: torch.device) -> float:
    """How much closer to the thin latent than the condition one network call comes, dB."""
    thin, condition = (x[None].to(device) for x in pair)
    model.eval()

    def forward(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out: Tensor = model(x, t)
        return out

    found = build_objective("bridge", residual_std=residual_std).sample(DepthWindows(forward, 8, 4), condition)
    return -10 * math.log10(float((found - thin).square().mean() / (condition - thin).square().mean()))


def print_row(row: dict[str, Any]) -> None:
    """One line of the table."""
    shape = "x".join(map(str, row["shape"]))
    head = f"  {shape:11} batch {row['batch']}  {row['variant']:22}"
    if row["step_s"] is None:
        print(f"{head} {row['note']}", flush=True)
        return
    print(
        f"{head} {row['step_s']:8.3f} s   MFU {100 * row['mfu']:5.1f}%   peak {row['peak_gib']:6.1f} GiB   "
        f"data wait {100 * row['data_wait']:5.2f}%   {PATIENTS_AN_EPOCH} patients {row['epoch_s']:7.1f} s",
        flush=True,
    )


def report(
    name: str,
    rate: float,
    config: UNetConfig,
    rows: list[dict[str, Any]],
    learned: dict[str, Any] | None,
    *,
    keep: bool,
) -> None:
    """The aims beside what was reached, and the JSON line."""
    ran = [row for row in rows if row["step_s"] is not None]
    small = [row for row in ran if row["shape"][1] == 64]
    large = [row for row in ran if row["shape"][1] == 128 and row["batch"] == 2]
    result: dict[str, Any] = {
        "bench": "unet_gpu",
        "device": name,
        "matmul_tflops": round(rate / 1e12, 2),
        "medium_parameters": parameter_count(model_preset("medium")),
        "latent_patch": config.latent_patch,
        "rows": rows,
        "learned": learned,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }
    if small:
        best = min(small, key=lambda row: float(row["epoch_s"]))
        result |= {key: best[key] for key in ("step_s", "mfu", "peak_gib", "epoch_s")}
        print(f"aims: MFU 40% (reached {100 * result['mfu']:.1f}%), epoch under 120 s ({result['epoch_s']:.0f} s)")
    if large:
        result["batch2_128_peak_gib"] = min(row["peak_gib"] for row in large)
        print(f"      batch 2 at 128x128 under 60 GiB ({result['batch2_128_peak_gib']:.1f} GiB)")
    if keep:
        target = Path(__file__).parent / "results" / f"unet_gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
