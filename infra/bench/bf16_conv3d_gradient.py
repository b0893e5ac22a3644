"""The weight gradient of a 3x3x3 convolution in bfloat16 on a CPU, beside float64: at which depths it is garbage.

    python infra/bench/bf16_conv3d_gradient.py

Relative error (norm of the difference over the norm) of the output and both gradients, at every depth, the worst over
plane sides and batches. The allocator is handed large numbers first: where a kernel leaves part of its result
unwritten, they show. Prints a table, then one JSON object, which is also kept in infra/bench/results/. See
infra/decisions/0011-bf16-on-cpu.md.
"""

from __future__ import annotations

import json
import platform
import warnings
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

DEPTHS, SIDES, BATCHES, CHANNELS = (1, 2, 3, 4, 5, 6, 8), (11, 16, 22), (1, 2), 16
WAYS = {"float32": (torch.float32, True), "bf16": (torch.bfloat16, True), "bf16_no_onednn": (torch.bfloat16, False)}
PARTS = ("output", "weight_gradient", "input_gradient")


def convolution(x: Tensor, weight: Tensor, seen: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output of a padded convolution, and the gradients of its product with ``seen`` by weight and by x, float64."""
    dirt = [torch.full((n,), 1e30) for n in (1_000, 100_000, 1_000_000)]
    del dirt
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight)]
    out = F.conv3d(leaves[0], leaves[1], padding=1)
    by_x, by_weight = torch.autograd.grad(out, leaves, seen.to(dtype))
    return [t.detach().double() for t in (out, by_weight, by_x)]


def worst_errors(depth: int) -> dict[str, float]:
    """Largest relative error of each part in each way, over sides and batches."""
    worst: dict[str, float] = {}
    for side, batch in product(SIDES, BATCHES):
        torch.manual_seed(0)
        x, seen = (torch.randn(batch, CHANNELS, depth, side, side).bfloat16() for _ in range(2))
        weight = (torch.randn(CHANNELS, CHANNELS, 3, 3, 3) / (27 * CHANNELS) ** 0.5).bfloat16()
        exact = convolution(x, weight, seen, torch.float64)
        for way, (dtype, onednn) in WAYS.items():
            with torch.backends.mkldnn.flags(enabled=onednn):
                found = convolution(x, weight, seen, dtype)
            for part, ours, wanted in zip(PARTS, found, exact, strict=True):
                error = float((ours - wanted).norm() / wanted.norm())
                key = f"{way} {part}"
                worst[key] = max(worst.get(key, 0.0), error if error == error else float("inf"))
    return worst


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the oneDNN switch warns about a setting of Intel GPUs
    table = {depth: worst_errors(depth) for depth in DEPTHS}
    names = list(table[DEPTHS[0]])
    for name in names:
        print(f"{name:32s}" + "  ".join(f"depth {depth}: {table[depth][name]:.1e}" for depth in DEPTHS))
    result = {
        "bench": "bf16_conv3d_gradient",
        # JSON knows no infinity
        "relative_error": {str(d): {n: f"{e:.2e}" for n, e in row.items()} for d, row in table.items()},
        "wrong_depths": [d for d, row in table.items() if not row["bf16 weight_gradient"] < 0.05],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    target = Path(__file__).parent / "results" / "bf16_conv3d_gradient-cpu.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
