"""The recipe of the ``tiny`` VAE: MAISI's architecture at narrow width, trained on phantoms alone.

    python infra/train_tiny_vae.py --minutes 45 --out pipeline/vae/tiny_vae.safetensors

Inputs are crops of synthetic chests (`tiny_vae_crops`). The network starts as a linear autoencoder on principal
components (`tiny_vae_start`), which is worth hours of two CPU cores. Crops are small at first, for many steps, and grow
towards the end, because GroupNorm sees a whole volume later. Losses: L1 and MSE first, MSE alone at the end (PSNR is
what the round trip is measured by), and a small KL that keeps the latents' scale bounded. Exported weights are the
exponential moving average, as float16.

All in float32: on CPUs with native bfloat16, weight gradients of 3-D convolutions under autocast come back as garbage
at random (torch 2.13). Crops come in twos: a batch of one on one thread takes torch's slow convolution, 5 times slower.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monai.networks.nets.autoencoderkl import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import save_file
from tiny_vae_crops import SOFT_TISSUE, Crops
from tiny_vae_start import ARCHITECTURE, LATENT_SIGMA, build, start_linear

from latentcache.storage import written_aside
from pipeline.phantom import make_patient

log = logging.getLogger("train_tiny_vae")

HELD_OUT_SEED = 900_000


@dataclass(frozen=True)
class Recipe:
    """What decides the weights, apart from the clock."""

    learning_rate: float = 1.2e-3
    warmup_steps: int = 40
    kl_weight: float = 5e-5
    ema_half_life_steps: int = 60
    pool: int = 6
    draws_per_patient: int = 40
    final_phase: float = 0.35  # share of the run under MSE alone


def held_out(count: int = 2) -> list[NDArray[np.float32]]:
    """Volumes in [0, 1] that training never sees."""
    out = []
    for k in range(count):
        p = make_patient(HELD_OUT_SEED + k, 96, 48, "APE" if k % 2 == 0 else "non-APE")
        out.append((SOFT_TISSUE.to_unit(p.thin.hu) + 1) / 2)
    return out


@torch.no_grad()
def round_trip_psnr(model: AutoencoderKL, volumes: list[NDArray[np.float32]]) -> tuple[float, float]:
    """Mean PSNR (dB over the window) through the posterior mean, and the latents' standard deviation."""
    psnr, spread = [], []
    for unit in volumes:
        x = torch.from_numpy(unit)[None, None]
        mu, _ = model.encode(x)
        y = model.decode(mu).clamp(0, 1)
        psnr.append(-10 * math.log10(float((y - x).square().mean())))
        spread.append(float(mu.std()))
    return float(np.mean(psnr)), float(np.mean(spread))


def export(model: AutoencoderKL, path: Path, facts: dict[str, Any]) -> None:
    """Float16 safetensors under MONAI's names; architecture and recipe as metadata. Replaced atomically."""
    tensors = {k: v.detach().to(torch.float16).contiguous() for k, v in model.state_dict().items()}
    metadata = {"architecture": json.dumps(ARCHITECTURE), "recipe": json.dumps(facts), "intensity": "[0, 1]"}
    with written_aside(path) as draft:
        save_file(tensors, draft, metadata=metadata)
        draft.chmod(0o644)


def loss_terms(
    model: AutoencoderKL, x: torch.Tensor, progress: float, recipe: Recipe
) -> tuple[torch.Tensor, dict[str, float]]:
    """Reconstruction of one crop through the posterior N(mu, LATENT_SIGMA^2), and its KL, which is mean(mu^2) / 2 here.

    The little noise keeps the decoder smooth in the latents; the KL keeps their scale near one.
    """
    mu, _ = model.encode(x)
    error = model.decode(mu + LATENT_SIGMA * torch.randn_like(mu)) - x
    # What overshoots a clipped voxel is clipped again on the way back to HU: it counts little.
    beyond = ((x >= 1) & (error > 0)) | ((x <= 0) & (error < 0))
    error = torch.where(beyond, 0.25 * error, error)
    energy = mu.square().mean()
    mse, l1 = error.square().mean(), error.abs().mean()
    final = progress > 1 - recipe.final_phase
    loss = (12 * mse + 0.05 * l1) if final else (l1 + 4 * mse)
    return loss + recipe.kl_weight * 0.5 * energy, {"mse": mse.item(), "energy": energy.item()}


def mean_over_workers(model: AutoencoderKL, clock: float, workers: int) -> float:
    """Averages gradients over the workers in one message, which also carries worker 0's clock (seconds)."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(p.grad.reshape(-1) for p in parameters if p.grad is not None), torch.tensor([clock])])
    if workers > 1:
        dist.all_reduce(flat)
        flat[:-1] /= workers
    offset = 0
    for p in parameters:
        p.grad = flat[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    return float(flat[-1])


def crop_voxels(progress: float) -> float:
    """Crops grow, so that GroupNorm's statistics come close to a whole volume's at the end."""
    return 3e4 if progress < 0.6 else (6e4 if progress < 0.85 else 1.5e5)


def learning_rate(step: int, progress: float, recipe: Recipe) -> float:
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * (0.5 * (1 + math.cos(math.pi * min(1.0, progress))) + 0.01)


def train(rank: int, args: argparse.Namespace, recipe: Recipe) -> None:
    """One worker: two crops of its own a step, gradients averaged. One thread each, which shared cores like best."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    if args.workers > 1:
        os.setsid()  # a scheduling group of its own, where the kernel shares time between sessions
        dist.init_process_group("gloo", init_method=f"file://{args.rendezvous}", rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    model = build()
    with torch.no_grad():
        starters = Crops(args.seed + 50, pool=6)
        starters.draw(1e4)
        start_linear(model, [(SOFT_TISSUE.to_unit(v) + 1) / 2 for v in starters.volumes])
    model.quant_conv_log_sigma.requires_grad_(False)
    model = model.to(memory_format=torch.channels_last_3d)
    average = deepcopy(model).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=1e-4)
    step, spent = 0, 0.0
    if args.resume and args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    torch.manual_seed(1000 * args.seed + rank + step)
    crops = Crops(args.workers * args.seed + rank, recipe.pool, recipe.draws_per_patient)
    crops.seed += step
    watched, began = held_out() if rank == 0 else [], time.monotonic() - spent
    budget, next_report, elapsed = 60.0 * args.minutes, spent + 60 * args.report_minutes, spent
    recent: list[float] = []
    skipped = 0
    while elapsed < budget and (args.steps is None or step < args.steps):
        progress = elapsed / budget if args.steps is None else step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, recipe)
        loss, terms = loss_terms(model, crops.draw(crop_voxels(progress)), progress, recipe)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        elapsed = mean_over_workers(model, time.monotonic() - began if rank == 0 else 0.0, args.workers)
        step += 1
        # GroupNorm of a nearly constant crop has a gradient without bound: such a step is left out.
        if torch.isfinite(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)):
            optimizer.step()
        else:
            skipped += 1
        decay = min(0.5 ** (1 / recipe.ema_half_life_steps), (1 + step) / (10 + step))
        with torch.no_grad():
            for target, source in zip(average.parameters(), model.parameters(), strict=True):
                target.lerp_(source, 1 - decay)
        recent.append(terms["mse"])
        if step % 50 == 0:
            psnr = -10 * math.log10(float(np.mean(recent)))
            recent.clear()
            log.info(
                "step %d %.1f min train %.2f dB latent energy %.2f skipped %d",
                step,
                elapsed / 60,
                psnr,
                terms["energy"],
                skipped,
            )
        if elapsed > next_report:
            next_report += 60 * args.report_minutes
            if rank == 0:
                report(average, watched, step, elapsed, args, recipe)
                state = {"model": model.state_dict(), "average": average.state_dict(), "step": step, "spent": elapsed}
                torch.save({**state, "optimizer": optimizer.state_dict()}, args.checkpoint)
    if rank == 0:
        report(average, watched, step, elapsed, args, recipe)


def report(
    average: AutoencoderKL,
    watched: list[NDArray[np.float32]],
    step: int,
    elapsed: float,
    args: argparse.Namespace,
    recipe: Recipe,
) -> None:
    """Measures the averaged weights on held-out phantoms and exports them."""
    psnr, spread = round_trip_psnr(average, watched)
    log.info("HELD OUT step %d %.1f min: %.2f dB, latent std %.2f", step, elapsed / 60, psnr, spread)
    facts = {
        "script": "infra/train_tiny_vae.py",
        "steps": step,
        "minutes": round(elapsed / 60, 1),
        "seed": args.seed,
        "held_out_psnr_db": round(psnr, 2),
        **recipe.__dict__,
    }
    export(average, args.out, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pipeline/vae/tiny_vae.safetensors"))
    parser.add_argument("--checkpoint", type=Path, default=Path("tiny_vae.pt"))
    parser.add_argument("--minutes", type=float, default=45.0, help="Length of the run; the schedule follows it.")
    parser.add_argument("--steps", type=int, help="Ends, and paces the schedule, by steps instead of the clock.")
    parser.add_argument("--report-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="Processes of one thread each.")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    if args.workers == 1:
        train(0, args, Recipe())
        return
    with tempfile.TemporaryDirectory() as folder:
        args.rendezvous = Path(folder) / "rendezvous"
        mp.spawn(train, args=(args, Recipe()), nprocs=args.workers)


if __name__ == "__main__":
    main()
