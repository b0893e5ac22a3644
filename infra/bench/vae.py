"""VAE on the CPU: encode and decode beside MONAI's `AutoencoderKlMaisi`, seconds and peak memory.

    python infra/bench/vae.py [--quick] [--threads N]

Full MAISI width, random weights, float32; every measurement in a process of its own. The peak is the high water mark of
the resident set above what stood before the call, held against what the plan predicted. "monai" is the class unsplit,
"published" with the configuration that comes with the weights (rows split in 16, memory saving on), in float32: its half-precision
norms do not run in a float32 model. Time is CPU seconds where
--threads is 1 (fair on a shared machine), else wall time. Without --quick: 16x512x512, and the slope over depth at
256x256. Prints a table, then one JSON object, which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PEERS = ("ours", "monai", "published")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8x128x128 and depths 8 to 24: under 60 s on 2 cores")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", nargs=4, metavar=("WHO", "PART", "DEPTH", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        who, part, depth, side = options.child
        print(json.dumps(_measure(who, part, int(depth), int(side), options.threads)))
        return
    depth, side = (8, 128) if options.quick else (16, 512)
    slope_depths, slope_side = ((8, 16, 24), 64) if options.quick else ((16, 32, 48, 64), 256)
    rows = [_child(w, p, depth, side, options.threads) for p in ("encode", "decode") for w in PEERS]
    slope = [_child("ours", "encode", d, slope_side, options.threads) for d in slope_depths]
    error = _child("ours", "error", 13, 32, options.threads)["error"]
    for row in rows + slope:
        peaks = f"{row['peak_gib']:8.2f} {row.get('predicted_gib', float('nan')):9.2f}"
        print(f"{row['who']:<10}{row['part']:<8}{row['shape']:>12} {row['seconds']:8.2f} s {peaks} GiB (predicted)")
    result = _summary(rows, slope, error, options)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"vae-cpu{'-quick' if options.quick else ''}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def _summary(rows: list[dict[str, Any]], slope: list[dict[str, Any]], error: float, options: Any) -> dict[str, Any]:
    import numpy as np

    by = {(r["who"], r["part"]): r for r in rows}
    depths, seconds = [r["depth"] for r in slope], [r["seconds"] for r in slope]
    rate, start = np.polyfit(depths, seconds, 1)
    linear = np.array(depths) * rate + start
    return {
        "bench": "vae",
        "device": platform.processor() or platform.machine(),
        "threads": options.threads,
        "quick": options.quick,
        "versions": {name: version(name) for name in ("torch", "monai", "numpy")},
        "size": rows[0]["shape"],
        "encode_vs_monai": by["published", "encode"]["seconds"] / by["ours", "encode"]["seconds"],
        "decode_vs_monai": by["published", "decode"]["seconds"] / by["ours", "decode"]["seconds"],
        "encode_vs_monai_unsplit": by["monai", "encode"]["seconds"] / by["ours", "encode"]["seconds"],
        "decode_vs_monai_unsplit": by["monai", "decode"]["seconds"] / by["ours", "decode"]["seconds"],
        "encode_peak_vs_monai": by["published", "encode"]["peak_gib"] / by["ours", "encode"]["peak_gib"],
        "decode_peak_vs_monai": by["published", "decode"]["peak_gib"] / by["ours", "decode"]["peak_gib"],
        "encode_peak_vs_monai_unsplit": by["monai", "encode"]["peak_gib"] / by["ours", "encode"]["peak_gib"],
        "decode_peak_vs_monai_unsplit": by["monai", "decode"]["peak_gib"] / by["ours", "decode"]["peak_gib"],
        "max_relative_error": error,
        "depth_linearity_error": float(np.max(np.abs(np.array(seconds) / linear - 1))),
        "peak_over_predicted": {
            f"{r['part']} {r['shape']}": r["peak_gib"] / r["predicted_gib"] for r in rows + slope if r["who"] == "ours"
        },
        "rows": rows + slope,
    }


def _child(*arguments: Any) -> dict[str, Any]:
    *child, threads = (str(a) for a in arguments)
    command = [sys.executable, __file__, "--threads", threads, "--child", *child]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(who: str, part: str, depth: int, side: int, threads: int) -> dict[str, Any]:
    import torch

    from pipeline.vae import Vae
    from pipeline.vae_architecture import KlAutoencoder, VaeArchitecture
    from pipeline.vae_weights import VaeWeights

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    architecture = VaeArchitecture()
    state = KlAutoencoder(architecture).state_dict()
    unit = torch.rand(depth, side, side) * 2 - 1
    latent = torch.randn(4, depth // 4, side // 4, side // 4)
    facts: dict[str, Any] = {"who": who, "part": part, "depth": depth, "shape": f"{depth}x{side}x{side}"}
    run: Callable[[], Any]
    if who == "ours":
        vae = Vae(VaeWeights(state, architecture, ""), torch.device("cpu"))
        if part == "error":
            return {"error": _error(vae, unit, state)}
        plan = vae.plan_encode((depth, side, side)) if part == "encode" else vae.plan_decode(latent.shape[1:])
        facts["predicted_gib"] = plan.device_bytes / 2**30

        def run() -> Any:
            return vae.encode(unit) if part == "encode" else vae.decode(latent, (depth, side, side))
    else:
        monai = _monai(state, num_splits=16 if who == "published" else 1)
        image, z = ((unit + 1) / 2)[None, None], latent[None]

        def run() -> Any:
            with torch.inference_mode():
                return monai.encode(image) if part == "encode" else monai.decode(z)

    # One small pass first: libraries load their code and pack the weights.
    warm = torch.zeros(4, 32, 32)
    if who == "ours":
        vae.decode(vae.encode(warm), (4, 32, 32))
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high water mark
    clock = time.process_time if threads == 1 else time.perf_counter
    started = clock()
    run()
    facts["seconds"] = clock() - started
    facts["peak_gib"] = (_status("VmHWM") - before) / 2**30
    return facts


def _error(vae: Any, unit: Any, state: dict[str, Any]) -> float:
    """Largest relative error of encode and decode at a depth of 13 against MONAI on the padded volume."""
    import torch
    import torch.nn.functional as F

    monai = _monai(state)
    d, h, w = (-n % m for n, m in zip(unit.shape, (4, 32, 32), strict=True))
    image = F.pad((unit[None, None] + 1) / 2, (0, w, 0, h, 0, d), mode="replicate")
    with torch.inference_mode():
        mean = monai.encode(image)[0]
        decoded = (monai.decode(mean)[0, 0, : unit.shape[0]] * 2 - 1).clamp(-1, 1)
    errors = [
        (vae.encode(unit) - mean[0]).abs().max() / mean.abs().max(),
        (vae.decode(mean[0], tuple(unit.shape)) - decoded).abs().max() / decoded.abs().max(),
    ]
    return float(max(errors))


def _monai(state: dict[str, Any], num_splits: int = 1) -> Any:
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
        num_splits=num_splits,
        dim_split=1,
        save_mem=True,
    ).eval()
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


if __name__ == "__main__":
    main()
