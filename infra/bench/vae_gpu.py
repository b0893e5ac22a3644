"""VAE on a GPU: 300x512x512 in bfloat16, encode and decode, beside MONAI's `AutoencoderKlMaisi`.

    python infra/bench/vae_gpu.py [--quick] [--device cuda:0] [--monai-depth 64]

Full MAISI width, random weights. Reports seconds, peak GiB (with and without activations in pinned host memory), the
arithmetic of every convolution over time as TFLOP/s, and that against the device's own bf16 matrix product rate,
measured here. MONAI runs at the depth it can hold (--monai-depth) and is compared per slice. Prints a table, then one
JSON object, which is also kept in infra/bench/results/ under the device's name.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.vae import Vae
from pipeline.vae_architecture import KlAutoencoder, VaeArchitecture
from pipeline.vae_executor import SlabExecutor
from pipeline.vae_weights import VaeWeights

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32x256x256")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--monai-depth", type=int, default=64)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark needs one; infra/bench/vae.py measures the CPU")
    device = torch.device(options.device)
    shape = (32, 256, 256) if options.quick else (300, 512, 512)
    depth, height, width = shape
    architecture = VaeArchitecture()
    torch.manual_seed(0)
    state = KlAutoencoder(architecture).state_dict()
    vae = Vae(VaeWeights(state, architecture, ""), device)
    unit = torch.rand(shape) * 2 - 1
    latent = torch.randn(4, depth // 4, height // 4, width // 4)
    work = {"encode": lambda: vae.encode(unit), "decode": lambda: vae.decode(latent, shape)}
    rate = matmul_tflops(device)
    result: dict[str, Any] = {
        "bench": "vae_gpu",
        "device": torch.cuda.get_device_name(device),
        "versions": {name: version(name) for name in ("torch", "monai")},
        "size": "x".join(map(str, shape)),
        "matmul_tflops": rate,
    }
    for part, run in work.items():
        plan = vae.plan_encode(shape) if part == "encode" else vae.plan_decode((depth // 4, height // 4, width // 4))
        seconds, peak = measure(run, device)
        tflop = tflop_per_voxel(architecture, part) * depth * height * width
        result |= {
            f"{part}_s": seconds,
            f"{part}_peak_gib": peak,
            f"{part}_predicted_gib": plan.device_bytes / 2**30,
            f"{part}_tflops": tflop / seconds,
            f"{part}_fraction_of_matmul_rate": tflop / seconds / rate,
        }
        print(f"ours   {part}: {seconds:7.2f} s {peak:6.2f} GiB {tflop / seconds:7.1f} TFLOP/s of {rate:.0f}")
    result["peak_gib"] = max(result["encode_peak_gib"], result["decode_peak_gib"])
    result["fraction_of_matmul_rate"] = result["encode_fraction_of_matmul_rate"]
    vae._executor = lambda plan: SlabExecutor(plan.slab_bytes, offload=True)  # type: ignore[method-assign]
    for part, run in work.items():
        seconds, peak = measure(run, device)
        result |= {f"{part}_offload_s": seconds, f"{part}_offload_peak_gib": peak}
        print(f"ours   {part}: {seconds:7.2f} s {peak:6.2f} GiB with activations in host memory")
    result |= beside_monai(state, shape, min(options.monai_depth, depth), result, device)
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"vae-{name}{'-quick' if options.quick else ''}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def measure(run: Callable[[], Any], device: torch.device, repeats: int = 2) -> tuple[float, float]:
    """Best seconds of ``repeats`` after a warm-up, and the peak GiB."""
    best = float("inf")
    for i in range(repeats + 1):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started) if i else best
    return best, torch.cuda.max_memory_allocated(device) / 2**30


def matmul_tflops(device: torch.device, n: int = 8192) -> float:
    """The device's measured bf16 rate on square matrices."""
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    repeats = 50

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
    state: dict[str, Any], shape: tuple[int, int, int], depth: int, ours: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """MONAI's class as published (bf16 autocast, norms in half precision, memory saving on), per slice."""
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

    model = AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=4,
        num_channels=(64, 128, 256),
        num_res_blocks=(2, 2, 2),
        norm_num_groups=32,
        norm_eps=1e-6,
        attention_levels=(False, False, False),
        use_convtranspose=False,
        norm_float16=True,
        num_splits=1,
        dim_split=1,
        save_mem=True,
    ).eval()
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    model.to(device)
    _, height, width = shape
    image = torch.rand(1, 1, depth, height, width, device=device)
    latent = torch.randn(1, 4, depth // 4, height // 4, width // 4, device=device)
    found: dict[str, Any] = {"monai_depth": depth}
    for part, run in (("encode", lambda: model.encode(image)), ("decode", lambda: model.decode(latent))):
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            try:
                seconds, peak = measure(run, device, repeats=1)
            except torch.cuda.OutOfMemoryError:
                found[f"monai_{part}"] = "out of memory"
                continue
        ratio = (seconds / depth) / (ours[f"{part}_s"] / shape[0])
        found |= {f"monai_{part}_s": seconds, f"monai_{part}_peak_gib": peak, f"{part}_vs_monai": ratio}
        print(f"MONAI  {part}: {seconds:7.2f} s {peak:6.2f} GiB at depth {depth}; ours is {ratio:.1f}x as fast a slice")
    return found


if __name__ == "__main__":
    main()
