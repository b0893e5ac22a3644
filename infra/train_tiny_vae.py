"""The recipe of the ``tiny`` VAE: MAISI's architecture at narrow width, trained on phantoms alone.

    python infra/train_tiny_vae.py --minutes 45 --out pipeline/weights/tiny_vae.safetensors

Inputs are crops of synthetic chests (thin, thick, and thick interpolated onto thin) at many pixel sizes and noise
levels, mostly under the soft-tissue window, some under others, with a few patches of plain geometry, so that the
network learns edges and not only chests. Crops vary in size and grow towards the end, because GroupNorm sees a whole
volume later. Losses: L1 and MSE first, MSE alone at the end (PSNR is what the round trip is measured by), and a small
KL that keeps latents near unit scale. Exported weights are the exponential moving average, as float16.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monai.networks.nets.autoencoderkl import AutoencoderKL
from numpy.typing import NDArray
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from pipeline.hu import Window
from pipeline.phantom import PhantomSettings, make_patient
from pipeline.resample import resample_z

log = logging.getLogger("train_tiny_vae")

ARCHITECTURE: dict[str, Any] = {
    "class": "monai.networks.nets.AutoencoderKL",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "channels": [16, 32, 64],
    "num_res_blocks": [2, 2, 2],
    "attention_levels": [False, False, False],
    "latent_channels": 4,
    "norm_num_groups": 4,
    "norm_eps": 1e-6,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
TRAINING_SEED = 1_000_000  # phantoms of users and tests have small seeds: training never sees them
HELD_OUT_SEED = 900_000
SOFT_TISSUE = Window()
LATENT_SIGMA = 0.02
ANCHOR = 6.0
FIELDS = ((96, 320.0), (128, 320.0), (128, 320.0), (160, 320.0), (192, 320.0), (192, 240.0), (224, 320.0))
"""Matrix and field of view (mm): what GroupNorm sees of a crop must resemble a whole volume, so planes stay wide."""


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


def build() -> AutoencoderKL:
    return AutoencoderKL(**{k: v for k, v in ARCHITECTURE.items() if k != "class"})


def start_linear(model: AutoencoderKL, volumes: list[NDArray[np.float32]]) -> None:
    """Start at a linear autoencoder: latents are principal components of 4x4x4 blocks, interpolated on the way back.

    From random weights a short run ends below what four principal components give; from here it starts there. Residual
    branches begin quiet, so all that is left between the blocks and the latents is GroupNorm. It is made nearly the
    identity by a pair of channels at +-ANCHOR in a group, far above the signal: they fix the group's mean and scale,
    whatever the crop holds. The posterior's standard deviation is the constant LATENT_SIGMA: only the mean is cached.
    """
    mean, basis, spread = principal_blocks(volumes)
    encoder, decoder = model.encoder.blocks, model.decoder.blocks
    triangle = torch.tensor([0.25, 0.5, 0.25])
    smooth = torch.einsum("a,b,c->abc", triangle, triangle, triangle)
    for name, parameter in model.named_parameters():
        if name.endswith(("conv2.conv.weight", "conv2.conv.bias")):
            parameter.mul_(0.05)
        elif name.endswith("nin_shortcut.conv.weight"):
            n = min(parameter.shape[:2])
            parameter[:n] *= 0
            parameter[torch.arange(n), torch.arange(n), 0, 0, 0] = 1
    # 4x4x4 block -> 8 taps of a 2x2x2 block -> +-component j on channels 2j, 2j + 1.
    first, half, quarter = encoder[0].conv, encoder[3].conv.conv, encoder[6].conv.conv
    first.weight[0], first.bias[0] = 0, 0
    first.weight[0, 0, 1, 1, 1] = 1
    half.weight[:8], half.bias[:8] = 0, 0
    quarter.weight[:16], quarter.bias[:16] = 0, 0
    components = (basis / spread[:, None]).reshape(4, 2, 2, 2, 2, 2, 2)  # j, z2, z1, y2, y1, x2, x1
    for k, (z1, y1, x1) in enumerate(np.ndindex(2, 2, 2)):
        half.weight[k, 0, z1, y1, x1] = 1
        for j in range(4):
            part = components[j, :, z1, :, y1, :, x1]
            quarter.weight[2 * j, k, :2, :2, :2] = part
            quarter.weight[2 * j + 1, k, :2, :2, :2] = -part
    for j in range(4):
        offset = float((basis[j] / spread[j]).sum()) * mean
        quarter.bias[2 * j], quarter.bias[2 * j + 1] = -offset, offset
    scale = _anchor(encoder[8], signals=8)
    encoder[10].conv.weight.mul_(0.02)
    decoder[0].conv.weight[:8], decoder[0].conv.bias[:8] = 0, 0
    for quant in (model.quant_conv_mu.conv, model.post_quant_conv.conv):
        quant.weight[..., 0, 0, 0], quant.bias[:] = torch.eye(4), 0
    for j in range(4):
        for sign in (0, 1):
            encoder[10].conv.weight[j, 2 * j + sign, 1, 1, 1] = (0.5 - sign) * scale
            decoder[0].conv.weight[2 * j + sign, j, 1, 1, 1] = 1 - 2 * sign
    encoder[10].conv.bias[:] = 0
    for up in (decoder[3].postconv.conv, decoder[6].postconv.conv):
        up.weight[:8], up.bias[:8] = 0, 0
        for c in range(8):
            up.weight[c, c] = smooth
    scale = _anchor(decoder[8], signals=2)
    block_mean = float(basis[0].sum()) * float(spread[0]) / 64
    decoder[10].conv.weight.mul_(0.02)
    decoder[10].conv.weight[0, 0, 1, 1, 1] = 0.5 * scale * block_mean
    decoder[10].conv.weight[0, 1, 1, 1, 1] = -0.5 * scale * block_mean
    decoder[10].conv.bias[:] = mean
    log_variance = model.quant_conv_log_sigma.conv
    log_variance.weight[:], log_variance.bias[:] = 0, 2 * math.log(LATENT_SIGMA)


def _anchor(last_block: Any, signals: int) -> float:
    """Puts +-ANCHOR on the last two channels of every group; returns the first group's scale, given unit signals."""
    bias = last_block.conv2.conv.bias
    size = len(bias) // int(ARCHITECTURE["norm_num_groups"])
    bias[size - 2 :: size] = ANCHOR
    bias[size - 1 :: size] = -ANCHOR
    return float(math.sqrt((2 * ANCHOR**2 + signals) / size))


def principal_blocks(volumes: list[NDArray[np.float32]]) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Mean, four principal components (4, 64) and their standard deviations (4,) of 4x4x4 blocks of [0, 1] volumes."""
    rows = []
    for volume in volumes:
        d, h, w = (n // 4 for n in volume.shape)
        cut = volume[: 4 * d, : 4 * h, : 4 * w].reshape(d, 4, h, 4, w, 4)
        rows.append(cut.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 64))
    blocks = np.concatenate(rows)
    mean = float(blocks.mean())
    values, vectors = np.linalg.eigh(np.cov((blocks - mean).T))
    basis = torch.from_numpy(vectors[:, ::-1][:, :4].T.astype(np.float32).copy())
    return mean, basis, torch.from_numpy(np.sqrt(values[::-1][:4]).astype(np.float32).copy())


class Crops:
    """Endless crops in [0, 1] from a pool of phantoms that is renewed one by one."""

    def __init__(self, seed: int, recipe: Recipe) -> None:
        self.rng = np.random.default_rng(seed)
        self.recipe = recipe
        self.seed = TRAINING_SEED + 100_000 * seed
        self.volumes: list[NDArray[np.float32]] = []
        self.drawn = 0

    def _patient(self) -> list[NDArray[np.float32]]:
        """Thin, thick and thick-on-thin HU of a new patient at a random pixel size and noise level."""
        rng = self.rng
        self.seed += 1
        size, field = FIELDS[int(rng.integers(len(FIELDS)))]
        sigma = float(rng.choice([0.0, 5.0, 9.0, 9.0, 13.0]))
        settings = PhantomSettings(field_of_view_mm=field, thin_sigma_hu=sigma, thick_sigma_hu=sigma / 2)
        category = "APE" if rng.random() < 0.5 else "non-APE"
        p = make_patient(self.seed, size, int(rng.integers(40, 72)), category, settings)
        on_thin = resample_z(
            p.thick.hu,
            np.asarray(p.thick.geometry.z_mm),
            np.asarray(p.thin.geometry.z_mm),
            "cubic" if rng.random() < 0.5 else "linear",
        )
        keep = [p.thin.hu.astype(np.float32), on_thin]
        if p.thick.hu.shape[0] >= 8:
            keep.append(p.thick.hu.astype(np.float32))
        return keep

    def _window(self) -> Window:
        u = self.rng.random()
        if u < 0.72:
            return SOFT_TISSUE
        if u < 0.80:
            return Window.parse("maisi")
        if u < 0.88:
            return Window.parse("lung")
        return Window(float(self.rng.uniform(-150, 150)), float(self.rng.uniform(150, 1600)))

    def _geometry_patch(self, shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """Random plane cuts of random brightness with a little noise."""
        rng = self.rng
        axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
        image = np.full(shape, rng.random(), dtype=np.float32)
        for _ in range(int(rng.integers(1, 9))):
            normal = rng.standard_normal(3)
            normal /= np.linalg.norm(normal)
            plane = sum(n * a for n, a in zip(normal, axes, strict=True))
            image = np.where(plane > rng.uniform(-0.9, 0.9), np.float32(rng.random()), image)
        if rng.random() < 0.7:
            image = gaussian_filter(image, float(rng.uniform(0.3, 1.2)))
        noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.04))
        return np.asarray(np.clip(image + noise, 0, 1), dtype=np.float32)

    def draw(self, voxels: float) -> torch.Tensor:
        """Two crops (2, 1, d, h, w) of about ``voxels`` each at most, every side a multiple of 4."""
        rng = self.rng
        if not self.volumes:
            while len(self.volumes) < self.recipe.pool:
                self.volumes += self._patient()
        elif self.drawn % self.recipe.draws_per_patient == 0:
            fresh = self._patient()
            self.volumes = self.volumes[len(fresh) :] + fresh
        self.drawn += 1
        volumes = [self.volumes[int(k)] for k in rng.choice(len(self.volumes), 2, replace=False)]
        limit = [min(v.shape[axis] for v in volumes) // 4 * 4 for axis in range(2)]
        depth = min(int(rng.choice([8, 12, 16, 24])), limit[0])
        side = min(int(math.sqrt(voxels / depth)) // 4 * 4, limit[1])
        return torch.from_numpy(np.stack([self._crop(v, (depth, side, side)) for v in volumes])[:, None])

    def _crop(self, volume: NDArray[np.float32], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """A random crop, flipped and windowed at random; plain geometry in place of an empty one."""
        rng = self.rng
        for _ in range(3):
            start = [int(rng.integers(n - s + 1)) for n, s in zip(volume.shape, shape, strict=True)]
            crop = volume[tuple(slice(o, o + s) for o, s in zip(start, shape, strict=True))]
            if crop.std() > 100:
                break
        for axis in range(3):
            crop = np.flip(crop, axis) if rng.random() < 0.5 else crop
        crop = crop.swapaxes(1, 2) if rng.random() < 0.5 else crop
        unit = (self._window().to_unit(np.ascontiguousarray(crop)) + 1) / 2
        return self._geometry_patch(shape) if unit.std() < 0.02 or rng.random() < 0.02 else unit


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
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    save_file(
        tensors,
        aside,
        metadata={"architecture": json.dumps(ARCHITECTURE), "recipe": json.dumps(facts), "intensity": "[0, 1]"},
    )
    aside.chmod(0o644)
    os.replace(aside, path)


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
    """One worker: a crop of its own a step, gradients averaged. One thread each, which two shared cores like best."""
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    os.setsid()  # a scheduling group of its own, where the kernel shares time between sessions
    if args.workers > 1:
        dist.init_process_group("gloo", init_method=f"file://{args.rendezvous}", rank=rank, world_size=args.workers)
    torch.manual_seed(args.seed)
    model = build()
    with torch.no_grad():
        starters = Crops(args.seed + 50, replace(recipe, pool=6))
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
    crops = Crops(args.workers * args.seed + rank, recipe)
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
    parser.add_argument("--out", type=Path, default=Path("pipeline/weights/tiny_vae.safetensors"))
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
