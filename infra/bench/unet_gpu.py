"""The U-Net's training step on a GPU: seconds, MFU, memory and data wait at full volume sizes.

    python infra/bench/unet_gpu.py [--quick] [--steps 8] [--variants eager,compiled,checkpointed]

Preset ``medium`` on whole latents 75x64x64 and 75x128x128 (a 300-slice volume at latent patch 2, and at patch 1), batch
1 and 2, read from a made-up LatentStore through the trainer's own stream; bf16 autocast, channels last, fused AdamW.
A step is reading, the objective's loss, backward, clipping and the update. MFU is 3 x forward FLOP over the step's time
and the bf16 matmul rate measured in the same run; recomputation does not count as useful work. Variants that do not fit
are reported as such. Without a GPU it runs preset ``tiny`` on small latents, to show that the script itself works, and
keeps nothing. Prints a table, then one JSON object, which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from diffusion.config import DataConfig  # noqa: E402
from diffusion.estimate import count_forward  # noqa: E402
from diffusion.loop import to_device  # noqa: E402
from diffusion.model_config import UNetConfig, model_preset  # noqa: E402
from diffusion.objective import build_objective  # noqa: E402
from diffusion.progress import measured_matmul_rate  # noqa: E402
from diffusion.stream import PairStream  # noqa: E402
from diffusion.train import generators  # noqa: E402
from diffusion.unet import build_unet, parameter_count  # noqa: E402
from latentcache.store import LatentStore  # noqa: E402

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
    options = parser.parse_args()
    variants = options.variants.split(",")
    if options.quick:
        options.steps, variants = 3, ["eager", "compiled+checkpointed"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    config = model_preset("medium" if on_gpu else "tiny")
    depth, sides, batches = (75, (64, 128), (1, 2)) if on_gpu else (8, (16,), (1, 2))
    if not on_gpu:
        variants = ["eager", "checkpointed"]
    rate = measured_matmul_rate(device, torch.bfloat16 if on_gpu else torch.float32)
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(f"{name}: {rate / 1e12:.1f} TFLOP/s in matrix products; {parameter_count(config) / 1e6:.1f}M parameters")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for side in sides:
            store = made_up_store(Path(scratch) / str(side), depth, side)
            flops = count_forward(config, 1, (depth, side, side), on_gpu)[1]
            for batch in batches:
                for variant in variants:
                    row = measure(config, store, device, depth, side, batch, variant, options.steps, flops, rate)
                    rows.append(row)
                    print_row(row)
    report(name, on_gpu, rate, config, rows, quick=options.quick)


def made_up_store(folder: Path, depth: int, side: int) -> LatentStore:
    """Four pairs of whole volumes of smooth noise."""
    from synthetic_latents import make_store

    return make_store(folder, splits=("train",) * 4, depths=(depth,), side=side)


def measure(
    config: UNetConfig,
    store: LatentStore,
    device: torch.device,
    depth: int,
    side: int,
    batch: int,
    variant: str,
    steps: int,
    flops: float,
    rate: float,
) -> dict[str, Any]:
    """One variant: warm up (compilation included), then the mean of the steps."""
    compiled, checkpointed = VARIANTS[variant]
    row: dict[str, Any] = {"variant": variant, "shape": [depth, side, side], "batch": batch}
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        timed = train(replace(config, activation_checkpointing=checkpointed), store, device, depth, batch, compiled)
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


def train(
    config: UNetConfig, store: LatentStore, device: torch.device, depth: int, batch: int, compiled: bool
) -> Iterator[tuple[float, float]]:
    """Training steps without end; yields (seconds, seconds spent waiting for data) of each."""
    on_gpu = device.type == "cuda"
    torch.manual_seed(0)
    model = build_unet(config).to(device)
    if on_gpu:
        model = model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if compiled:
        model.compile()
    optimiser = torch.optim.AdamW(model.parameters(), 1e-4, fused=on_gpu)
    objective = build_objective("bridge")
    data = DataConfig(batch_size=batch, depth_bucket=depth)
    stream = PairStream(
        store, data, samples_per_step=batch, in_plane_multiple=config.in_plane_multiple, pin_memory=on_gpu
    )
    steps = iter(stream)
    while True:
        begin = time.perf_counter()
        read = next(next(steps).batches)
        waited = time.perf_counter() - begin
        ready = to_device(read, device)
        random = generators(ready["noise_seed"], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            terms = objective.loss(model, ready["thin"], ready["condition"], ready["mask"], random)
            loss = terms.per_sample.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if not torch.isfinite(loss):
            raise SystemExit("the loss is not finite")
        if on_gpu:
            torch.cuda.synchronize()
        yield time.perf_counter() - begin, waited


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
    name: str, on_gpu: bool, rate: float, config: UNetConfig, rows: list[dict[str, Any]], *, quick: bool
) -> None:
    """The aims beside what was reached, and the JSON line, kept where a GPU was measured in full."""
    ran = [row for row in rows if row["step_s"] is not None]
    small = [row for row in ran if row["shape"][1] == 64]
    large = [row for row in ran if row["shape"][1] == 128 and row["batch"] == 2]
    result: dict[str, Any] = {
        "bench": "unet_gpu",
        "device": name,
        "matmul_tflops": round(rate / 1e12, 1),
        "medium_parameters": parameter_count(model_preset("medium")),
        "latent_patch": config.latent_patch,
        "rows": rows,
        "quick": quick,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }
    if small:
        best = min(small, key=lambda row: float(row["epoch_s"]))
        result |= {key: best[key] for key in ("step_s", "mfu", "peak_gib", "epoch_s")}
    if large:
        result["batch2_128_peak_gib"] = min(row["peak_gib"] for row in large)
    if on_gpu and small:
        print(f"aims: MFU 40% (reached {100 * result['mfu']:.1f}%), epoch under 120 s ({result['epoch_s']:.0f} s)")
        if large:
            print(f"      batch 2 at 128x128 under 60 GiB ({result['batch2_128_peak_gib']:.1f} GiB)")
    if on_gpu and not quick:
        target = Path(__file__).parent / "results" / f"unet_gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower())}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
