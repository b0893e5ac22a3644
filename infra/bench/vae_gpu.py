"""VAE on a GPU: 300x512x512 in bfloat16, encode and decode, beside MONAI's `AutoencoderKlMaisi`.

    python infra/bench/vae_gpu.py [--quick] [--device cuda:0] [--size 300 512 512] [--monai-depth 64]

Full MAISI width, random weights. Reports the device's own bf16 matrix product rate, seconds, peak GiB against the
plan's prediction, the convolutions' arithmetic over time against that rate, the same with activations in pinned host
memory, and the error of both precisions against an unsplit float32 pass on the CPU. MONAI, where it is installed,
runs as it comes with the weights (rows split in 16, norms in half precision, memory saving on) and unsplit, at the
depth that it can hold (--monai-depth), and is compared per slice. Needs PyTorch and NumPy; runs from a checkout
without installing anything. With --device cpu (or where there is no GPU) it does all of that in float32 on 8x256x32,
to show that the script itself works, and keeps nothing. Prints a table, then one JSON object, which is also kept in
infra/bench/results/ under the device's name.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import platform
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from vae import RESULTS, Peak, monai_maisi, peak_above, relative_errors, versions

from pipeline.vae import KlAutoencoder, Vae, VaeArchitecture, VaeWeights
from pipeline.vae.streaming import SlabExecutor

Shape = tuple[int, int, int]
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32x256x256")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="multiples of 4")
    parser.add_argument("--monai-depth", type=int, default=64)
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    depth, height, width = options.size or ((32, 256, 256) if options.quick else (300, 512, 512))
    if not on_gpu and options.size is None:
        depth, height, width = 8, 256, 32
    shape = (depth, height, width)
    architecture = VaeArchitecture()
    torch.manual_seed(0)
    weights = VaeWeights(KlAutoencoder(architecture).state_dict(), architecture, "")
    rate = matmul_tflops(device)
    result: Row = {
        "bench": "vae_gpu",
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{platform.machine()} cpu",
        "versions": versions("torch", "monai", "numpy") | {"python": platform.python_version()},
        "size": "x".join(map(str, shape)),
        "dtype": "bfloat16" if on_gpu else "float32",
        "matmul_tflops": rate,
    }
    print(f"{result['device']}: {rate:.3g} TFLOP/s in {result['dtype']} matrix products")
    result |= ours(weights, shape, rate, device)
    result["peak_gib"] = max(result["encode_peak_gib"], result["decode_peak_gib"])
    result["fraction_of_matmul_rate"] = result["encode_fraction_of_matmul_rate"]
    result |= errors(weights, device)
    if importlib.util.find_spec("monai") is None:
        print("MONAI is not installed: not compared")
    else:
        for name, splits in (("monai_published", 16), ("monai_unsplit", 1)):
            result |= beside_monai(name, splits, weights, shape, min(options.monai_depth, depth), result, device)
    if on_gpu:
        name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"vae-{name}{'-quick' if options.quick or options.size else ''}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def ours(weights: VaeWeights, shape: Shape, rate: float, device: torch.device) -> Row:
    """Encode and decode, with activations on the device and then in (pinned) host memory."""
    depth, height, width = shape
    latent_zyx = (depth // 4, height // 4, width // 4)
    unit, latent = torch.rand(shape) * 2 - 1, torch.randn(4, *latent_zyx)
    vae = Vae(weights, device)
    found: Row = {}
    for part in ("encode", "decode"):
        plan = vae.plan_encode(shape) if part == "encode" else vae.plan_decode(latent_zyx)
        run = (lambda: vae.encode(unit)) if part == "encode" else (lambda: vae.decode(latent, shape))
        vae._executor = lambda plan: SlabExecutor(plan.slab_bytes, offload=plan.offload)  # type: ignore[method-assign]
        seconds, peak = measure(run, device)
        tflops = tflop_per_voxel(weights.architecture, part) * depth * height * width / seconds
        found |= {
            f"{part}_s": seconds,
            f"{part}_peak_gib": peak,
            f"{part}_predicted_gib": plan.device_bytes / 2**30,
            f"{part}_tflops": tflops,
            f"{part}_fraction_of_matmul_rate": tflops / rate,
        }
        print(f"ours {part:<18}{seconds:8.2f} s {peak:7.2f} GiB {tflops:7.3g} TFLOP/s, {tflops / rate:.0%} of products")
        vae._executor = lambda plan: SlabExecutor(plan.slab_bytes, offload=True)  # type: ignore[method-assign]
        seconds, peak = measure(run, device)
        found |= {f"{part}_offload_s": seconds, f"{part}_offload_peak_gib": peak}
        print(f"ours {part:<9} offload {seconds:8.2f} s {peak:7.2f} GiB with activations in host memory")
    return found


def errors(weights: VaeWeights, device: torch.device) -> Row:
    """Of encode and decode on the device, in both precisions, against an unsplit float32 pass on the CPU."""
    torch.manual_seed(1)
    unit = torch.rand(13, 64, 64) * 2 - 1
    reference = weights.build()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        # Plain float32 means plain: not TensorFloat-32, which rounds products to 10 bits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found[name] = relative_errors(Vae(weights, device, dtype=dtype), unit, reference)
        print(f"relative error in {name}: " + ", ".join(f"{k} {v:.1e}" for k, v in found[name].items()))
    return {"relative_error": found}


def measure(run: Callable[[], Any], device: torch.device, repeats: int = 2) -> tuple[float, float]:
    """Best seconds of ``repeats`` after a warm-up, and the peak GiB: allocated on a GPU, resident above what stood
    before on a CPU."""
    run()
    best, peak = float("inf"), 0.0
    for _ in range(repeats):
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        # A GPU's machine may forbid the reset of the resident set's high water mark, which is not what counts there.
        with contextlib.nullcontext(Peak()) if device.type == "cuda" else peak_above() as resident:
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - started)
        on_device = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else resident.gib
        peak = max(peak, on_device)
    return best, peak


def matmul_tflops(device: torch.device) -> float:
    """The device's measured rate on square matrices: bf16 on a GPU, float32 on a CPU."""
    on_gpu = device.type == "cuda"
    n, repeats, dtype = (8192, 50, torch.bfloat16) if on_gpu else (1024, 5, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b)

    seconds, _ = measure(products, device)
    return 2 * n**3 * repeats / seconds / 1e12


def tflop_per_voxel(architecture: VaeArchitecture, part: str) -> float:
    """Arithmetic of an unsplit pass, counted on shapes alone."""
    with torch.device("meta"):
        network: nn.Module = KlAutoencoder(architecture)
        image, z = torch.empty(1, 1, 32, 64, 64), torch.empty(1, 4, 8, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.encode(image) if part == "encode" else network.decode(z)
    return counter.get_total_flops() / image.numel() / 1e12


def beside_monai(
    name: str, splits: int, weights: VaeWeights, shape: Shape, depth: int, beside: Row, device: torch.device
) -> Row:
    """MONAI's class at ``depth`` slices: bf16 autocast and norms in half precision on a GPU, float32 on a CPU."""
    on_gpu = device.type == "cuda"
    model = monai_maisi(weights.state, num_splits=splits, norm_float16=on_gpu).to(device)
    _, height, width = shape
    image = torch.rand(1, 1, depth, height, width, device=device)
    latent = torch.randn(1, 4, depth // 4, height // 4, width // 4, device=device)
    found: Row = {f"{name}_depth": depth}
    for part, run in (("encode", lambda: model.encode(image)), ("decode", lambda: model.decode(latent))):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            try:
                seconds, peak = measure(run, device, repeats=1)
            except RuntimeError as error:  # out of memory, or splits thinner than a kernel
                found[f"{name}_{part}"] = str(error).splitlines()[0]
                print(f"{name} {part}: failed at depth {depth}: {found[f'{name}_{part}']}")
                continue
        ratio = (seconds / depth) / (beside[f"{part}_s"] / shape[0])
        found |= {f"{name}_{part}_s": seconds, f"{name}_{part}_peak_gib": peak, f"{part}_vs_{name}": ratio}
        print(f"{name} {part}: {seconds:8.2f} s {peak:7.2f} GiB at depth {depth}; ours is {ratio:.1f}x as fast a slice")
    return found


if __name__ == "__main__":
    main()
