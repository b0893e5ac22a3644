"""VAE on the CPU: encode and decode beside MONAI's `AutoencoderKlMaisi`, seconds and peak memory.

    python infra/bench/vae.py [--quick] [--threads N] [--only compare|slope]

Full MAISI width, random weights, float32; every measurement in a process of its own. The peak is the high water mark of
the resident set above what stood before the call, held against what the plan predicted. "monai" is the class unsplit,
"published" with the configuration that comes with the weights (rows split in 16, memory saving on), in float32: its
half-precision norms do not run in a float32 model. Time is wall time, or CPU seconds where --threads is 1.

The slope over depth (16 to 64 slices of 256x256) is measured on one thread, in CPU seconds, the best of two runs: on
two threads of a shared machine one neighbour is enough to bend it. `depth_linearity_error` is the largest distance from
the fitted line, `depth_exponent` the slope of log time over log depth: 1 where time is proportional to depth.

--quick: 8x128x128 and 64x64, under 60 s on 2 cores. --only measures one half and keeps the other half of the results.
Prints a table, then one JSON object, which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PEERS = ("ours", "monai", "published")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8x128x128 and depths 8 to 24: under 60 s on 2 cores")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", choices=("compare", "slope"))
    parser.add_argument("--child", nargs=5, metavar=("WHO", "PART", "DEPTH", "SIDE", "REPEATS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        who, part, depth, side, repeats = options.child
        print(json.dumps(_measure(who, part, int(depth), int(side), int(repeats), options.threads)))
        return
    path = RESULTS / f"vae-cpu{'-quick' if options.quick else ''}.json"
    result: dict[str, Any] = json.loads(path.read_text()) if options.only and path.exists() else {}
    result |= {
        "bench": "vae",
        "device": platform.processor() or platform.machine(),
        "quick": options.quick,
        "versions": versions("torch", "monai", "numpy"),
    }
    if options.only != "slope":
        result |= compare(*((8, 128) if options.quick else (16, 512)), options.threads)
    if options.only != "compare":
        result |= slope((8, 16, 24) if options.quick else (16, 32, 48, 64), 64 if options.quick else 256)
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def compare(depth: int, side: int, threads: int) -> dict[str, Any]:
    """Ours beside MONAI's, and the error against it at a small size."""
    rows = [_child(who, part, depth, side, threads) for part in ("encode", "decode") for who in PEERS]
    by = {(row["who"], row["part"]): row for row in rows}
    found: dict[str, Any] = {"threads": threads, "size": rows[0]["shape"]}
    for peer, suffix in (("published", "monai"), ("monai", "monai_unsplit")):
        for part in ("encode", "decode"):
            ours, theirs = by["ours", part], by[peer, part]
            found[f"{part}_vs_{suffix}"] = theirs["seconds"] / ours["seconds"]
            found[f"{part}_peak_vs_{suffix}"] = theirs["peak_gib"] / ours["peak_gib"]
    found["max_relative_error"] = _child("ours", "error", 13, 32, threads)["error"]
    return found | {"peak_over_predicted": _against_plan(rows), "rows": rows}


def slope(depths: tuple[int, ...], side: int) -> dict[str, Any]:
    """How the time of encode grows with depth."""
    import numpy as np

    rows = [_child("ours", "encode", depth, side, 1, repeats=2) for depth in depths]
    seconds = np.array([row["seconds"] for row in rows])
    rate, start = np.polyfit(depths, seconds, 1)
    exponent, _ = np.polyfit(np.log(depths), np.log(seconds), 1)
    return {
        "depth_linearity_error": float(np.max(np.abs(seconds / (rate * np.array(depths) + start) - 1))),
        "depth_exponent": float(exponent),
        "slope_peak_over_predicted": _against_plan(rows),
        "slope_rows": rows,
    }


def _against_plan(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {f"{r['part']} {r['shape']}": r["peak_gib"] / r["predicted_gib"] for r in rows if r["who"] == "ours"}


def _child(who: str, part: str, depth: int, side: int, threads: int, repeats: int = 1) -> dict[str, Any]:
    """Measured in a process of its own: best seconds and highest peak of ``repeats`` runs."""
    child = [str(a) for a in (who, part, depth, side, repeats)]
    command = [sys.executable, __file__, "--threads", str(threads), "--child", *child]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "seconds" in row:
        peaks = f"{row['peak_gib']:8.2f} {row.get('predicted_gib', float('nan')):9.2f}"
        print(f"{row['who']:<10}{row['part']:<8}{row['shape']:>12} {row['seconds']:8.2f} s {peaks} GiB (predicted)")
    return row


def _measure(who: str, part: str, depth: int, side: int, repeats: int, threads: int) -> dict[str, Any]:
    import torch

    from pipeline.vae import KlAutoencoder, Vae, VaeArchitecture, VaeWeights

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
            return {"error": max(relative_errors(vae, unit, monai_maisi(state)).values())}
        plan = (
            vae.plan_encode((depth, side, side))
            if part == "encode"
            else vae.plan_decode((latent.shape[1], latent.shape[2], latent.shape[3]))
        )
        facts["predicted_gib"] = plan.device_bytes / 2**30

        def run() -> Any:
            return vae.encode(unit) if part == "encode" else vae.decode(latent, (depth, side, side))
    else:
        monai = monai_maisi(state, num_splits=published_splits(side) if who == "published" else 1)
        image, z = ((unit + 1) / 2)[None, None], latent[None]

        def run() -> Any:
            with torch.inference_mode():
                return monai.encode(image) if part == "encode" else monai.decode(z)

    # One small pass first: libraries load their code and pack the weights.
    warm = torch.zeros(4, 32, 32)
    if who == "ours":
        vae.decode(vae.encode(warm), (4, 32, 32))
    clock = time.process_time if threads == 1 else time.perf_counter
    facts |= {"threads": threads, "seconds": float("inf"), "peak_gib": 0.0}
    for _ in range(repeats):
        with peak_above() as resident:
            started = clock()
            run()
            facts["seconds"] = min(facts["seconds"], clock() - started)
        facts["peak_gib"] = max(facts["peak_gib"], resident.gib)
    return facts


def relative_errors(vae: Any, unit: Any, network: Any) -> dict[str, float]:
    """Of encoding the padded volume and decoding normal noise, against ``network``'s unsplit pass: the largest error
    over the largest value, and the standard deviation of the error over that of the values."""
    import torch
    import torch.nn.functional as F

    d, h, w = (-n % m for n, m in zip(unit.shape, (4, 32, 32), strict=True))
    image = F.pad((unit[None, None] + 1) / 2, (0, w, 0, h, 0, d), mode="replicate")
    depth, height, width = unit.shape
    with torch.inference_mode():
        mean = network.encode(image)[0]
        latent = torch.randn(mean.shape)
        decoded = (network.decode(latent)[0, 0, :depth, :height, :width] * 2 - 1).clamp(-1, 1)
    ours = {"encode": vae.encode(unit), "decode": vae.decode(latent[0], tuple(unit.shape))}
    theirs = {"encode": mean[0], "decode": decoded}
    found = {}
    for part, other in theirs.items():
        found[part] = float((ours[part] - other).abs().max() / other.abs().max())
        found[f"{part}_std"] = float((ours[part] - other).std() / other.std())
    return found


def published_splits(side: int) -> int:
    """Splits of the rows: 16 as published, fewer for a plane whose latents it would cut below the kernel's margin.

    MONAI's class begins every split 3 rows early (4 where it halves): at a quarter of ``side`` a split must be as long.
    """
    return min(16, side // 16)


def monai_maisi(state: dict[str, Any], *, num_splits: int = 1, norm_float16: bool = False) -> Any:
    """MONAI's class with these weights, configured as it comes with MAISI's but for what is given."""
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
        norm_float16=norm_float16,
        num_splits=num_splits,
        dim_split=1,
        save_mem=True,
    ).eval()
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model


@dataclass
class Peak:
    """GiB that the process was resident at most, above what it was at the start."""

    gib: float = 0.0


@contextmanager
def peak_above() -> Iterator[Peak]:
    """The high water mark of what runs inside (Linux)."""
    peak = Peak()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high water mark
    yield peak
    peak.gib = (_status("VmHWM") - before) / 2**30


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def versions(*names: str) -> dict[str, str]:
    """Of the packages that are there."""
    return {name: version(name) for name in names if importlib.util.find_spec(name) is not None}


if __name__ == "__main__":
    main()
