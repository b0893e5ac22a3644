"""Choices of the learned part, one at a time: what a bridge is told, what its loss weighs, what it is trained on.

    python infra/bench/learned_choices.py [--quick] [--steps 300] [--seeds 1,2,3] [--only NAME,...] [--keep FOLDER]

Every choice trains the tiny U-Net for as many steps of as many latents from the same initial weights and draws of the
same phantoms, and differs from ``base`` in one thing. Scored is what ``ctpipe decode`` would write, but for the
agreement with the thick slices: start + D(one step) - D(condition), PSNR between -160 and 240 HU over the common
extent, on patients that no training saw; with the share of the change that errs least on two more patients
(``val_change_gain``), as a run does. Figures are differences to ``base`` of the same seed, with their standard
deviation over seeds.

Choices: ``thick_hu``, 32 more condition channels, the two thick slices about every latent slice as 4 x 4 pixels a
latent; ``frequency``, the loss weighs each channel by what its error does to the image in four bands of spatial
frequency, measured on the decoder; ``flips``, half of the samples mirrored along x or y before encoding; ``window_4``
and ``window_16``, as many latents a step in shorter or longer windows; ``patch_2``, 2 x 2 latents folded into channels;
``no_weights``, all channels alike; ``untold``, without the places of the thick slices. ``ema_N``: base with averaged
weights over some N steps. ``refined``: from the slices of the model that ships, where ``refined_thick_hu`` and
``refined_frequency`` differ from ``refined``.

A run again with --keep goes on. Prints a table, then one JSON object, also kept in infra/bench/results/ (not with
--quick).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.config import load_config
from diffusion.losses import channel_power
from diffusion.networks import ThickSlices, UNet, build_unet
from diffusion.objectives.bridge import Bridge
from latentcache import LatentGrid
from pipeline.phantom import make_patient
from pipeline.refiner import RefinerFile, refined_volume
from pipeline.vae import Vae, load_vae
from pipeline.volume import Volume, Window, common_slices, resample_z

RESULTS = Path(__file__).parent / "results"
WINDOW = Window()
FLIPS = ("", "x", "y")
EMA_STEPS = (30, 100, 300)
BANDS = 4


@dataclass(frozen=True)
class Choice:
    """One way to train. ``start``: interpolated or refined; ``window``, ``crop``: of a sample, in latents."""

    start: str = "interpolated"
    thick_hu: bool = False
    weights: str = "channel"
    flips: bool = False
    window: int = 8
    crop: int = 24
    patch: int = 1
    told: bool = True

    @property
    def batch(self) -> int:
        """Samples of a step, so that every choice sees as many latents."""
        return round(2 * 8 * 24 * 24 / (self.window * self.crop**2))


CHOICES = {
    "base": Choice(),
    "thick_hu": Choice(thick_hu=True),
    "frequency": Choice(weights="frequency"),
    "no_weights": Choice(weights="none"),
    "untold": Choice(told=False),
    "flips": Choice(flips=True),
    "window_4": Choice(window=4),
    "window_16": Choice(window=16),
    "patch_2": Choice(patch=2),
    "refined": Choice("refined"),
    "refined_thick_hu": Choice("refined", thick_hu=True),
    "refined_frequency": Choice("refined", weights="frequency"),
}
BASES = {name: "refined" if choice.start == "refined" else "base" for name, choice in CHOICES.items()}


@dataclass(frozen=True)
class Case:
    """One patient, encoded: latents (4, d, h, w) by role and mirror; HU of truth and starts; thick slices."""

    latents: dict[str, NDArray[np.float32]]
    truth: NDArray[np.float32]
    starts: dict[str, NDArray[np.float32]]
    thick: dict[str, NDArray[np.float32]]
    told: NDArray[np.float32]


def make_case(vae: Vae, refiner: RefinerFile, seed: int, size: int, slices: int, mirrored: bool) -> Case:
    """A phantom on the slices that its thick series covers; mirrored too where it is trained on."""
    patient = make_patient(seed, size, slices, "APE" if seed % 2 else "non-APE")
    inside = common_slices(patient.thick.geometry, patient.thin.geometry)
    inside = slice(inside.start, inside.start + (inside.stop - inside.start) // 4 * 4)
    grid = patient.thin.geometry.with_z(np.array(patient.thin.geometry.z_mm)[inside])
    z = np.array(grid.z_mm)
    starts = {
        "interpolated": resample_z(patient.thick.hu, np.array(patient.thick.geometry.z_mm), z),
        "refined": refined_volume(refiner, patient.thick, z, WINDOW),
    }
    volumes = {"thin": patient.thin.hu[inside], **starts}
    latents = {}
    for axis in FLIPS if mirrored else ("",):
        for role, hu in volumes.items():
            unit = np.ascontiguousarray(flipped(WINDOW.to_unit(hu), axis))
            latents[f"{role}{axis}"] = np.asarray(vae.encode(unit), np.float32)
    at = LatentGrid.of(grid).positions()
    thick = as_channels(patient.thick, at)
    had = patient.thick.geometry
    places = ThickSlices(had.z_mm[0], had.spacing_mm_zyx[0], len(had.z_mm), had.thickness_mm)
    clip = {name: np.clip(hu, WINDOW.lower, WINDOW.upper).astype(np.float32) for name, hu in volumes.items()}
    return Case(
        latents,
        clip["thin"],
        {name: clip[name] for name in starts},
        {axis: pixels_folded(flipped(thick, axis)) for axis in (FLIPS if mirrored else ("",))},
        places.seen_from(at),
    )


def flipped(volume: NDArray[Any], axis: str) -> NDArray[Any]:
    """Mirrored along x or y, the last two axes."""
    return np.flip(volume, {"x": -1, "y": -2}[axis]) if axis else volume


def as_channels(thick: Volume, z_mm: NDArray[np.float64]) -> NDArray[np.float32]:
    """The slices below and above every position, (2, D, rows, columns), on [-1, 1]."""
    had = np.array(thick.geometry.z_mm)
    below = np.clip(np.searchsorted(had, z_mm, side="right") - 1, 0, len(had) - 2)
    unit = WINDOW.to_unit(thick.hu)
    return np.stack([unit[below], unit[below + 1]]).astype(np.float32)


def pixels_folded(slices: NDArray[np.float32]) -> NDArray[np.float32]:
    """(2, D, rows, columns) as (32, D, rows / 4, columns / 4): 4 x 4 pixels a latent."""
    n, depth, rows, columns = slices.shape
    cells = slices.reshape(n, depth, rows // 4, 4, columns // 4, 4).transpose(0, 3, 5, 1, 2, 4)
    return np.ascontiguousarray(cells.reshape(n * 16, depth, rows // 4, columns // 4))


class Evidence(Bridge):
    """A bridge from the first four channels of its condition; the network sees all of them."""

    def loss_of(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        clean: Tensor,
        given: Tensor,
        weigh: Weigh,
        rng: torch.Generator,
    ) -> Tensor:
        """Weighted mean squared error of y over a batch."""
        condition = given[:, :4]
        y = self._to_y(clean, condition)
        t = torch.tensor([self._draw_time(rng) for _ in range(len(y))])
        at = t.reshape(-1, 1, 1, 1, 1)
        noise = torch.randn(y.shape, generator=rng)
        x = (1 - at) * y + self.sigma * (at * (1 - at)).clamp(min=0).sqrt() * noise
        return weigh(model(torch.cat([x, given], 1), t) - y)

    def mean_of(self, model: Callable[[Tensor, Tensor], Tensor], given: Tensor) -> Tensor:
        """One step: the posterior mean."""
        condition = given[:, :4]
        return self._from_y(
            model(torch.cat([torch.zeros_like(condition), given], 1), torch.ones(len(given))), condition
        )


Weigh = Callable[[Tensor], Tensor]


def channel_weigh(power: Tensor) -> Weigh:
    """The mean square with a weight a channel, of mean one."""
    weights = (power / power.mean()).reshape(1, -1, 1, 1, 1)
    return lambda error: (weights * error.square()).mean()


def frequency_weigh(power: Tensor) -> Weigh:
    """The same with a weight a channel and band of in-plane and axial frequency, (4, BANDS)."""
    weights = power / power.mean()

    def weigh(error: Tensor) -> Tensor:
        spectrum = torch.fft.rfftn(error, dim=(2, 3, 4), norm="ortho")
        places = band_of(error.shape[2:])
        # rfftn keeps half of the last axis: what has a mirror image counts twice.
        twice = torch.full((spectrum.shape[-1],), 2.0)
        twice[0] = 1
        if error.shape[-1] % 2 == 0:
            twice[-1] = 1
        return (weights[:, places][None] * spectrum.abs().square() * twice).sum() / error.numel()

    return weigh


def band_of(shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Band of every coefficient of rfftn over (D, H, W): by the radius in cycles a latent, up to half and beyond."""
    d, h, w = shape
    axes = [torch.fft.fftfreq(d), torch.fft.fftfreq(h), torch.fft.rfftfreq(w)]
    radius = torch.sqrt(sum(a.square() for a in torch.meshgrid(*axes, indexing="ij")))  # type: ignore[arg-type]
    return (radius * 2 * BANDS / 1.5).long().clamp(max=BANDS - 1)


def frequency_power(vae: Vae, cases: list[Case], std: NDArray[np.float32]) -> Tensor:
    """HU^2-like image power of a unit of whitened error, by channel and band, (4, BANDS): probes of the decoder."""
    rng = torch.Generator().manual_seed(0)
    found = torch.zeros(4, BANDS)
    for case in cases[:2]:
        z = torch.from_numpy(case.latents["thin"][:, 2:10])
        shape = (z.shape[1] * 4, z.shape[2] * 4, z.shape[3] * 4)
        plain = torch.as_tensor(np.asarray(vae.decode(z, shape)))
        places = band_of(z.shape[1:])
        for channel in range(4):
            for band in range(BANDS):
                white = torch.fft.rfftn(torch.randn(z.shape[1:], generator=rng), dim=(0, 1, 2))
                probe = torch.fft.irfftn(white * (places == band), s=z.shape[1:], dim=(0, 1, 2))
                probe *= 0.05 / probe.std()
                moved = z.clone()
                moved[channel] += probe * float(std[channel])
                seen = torch.as_tensor(np.asarray(vae.decode(moved, shape)))
                change = seen.clamp(-1, 1) - plain.clamp(-1, 1)
                found[channel, band] += float(change.square().mean()) / 0.05**2
    return found


@dataclass(frozen=True)
class Fold:
    """Cases of a seed and what training needs of all of them."""

    vae: Vae
    train: list[Case]
    gain: list[Case]
    score: list[Case]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    channel: Tensor
    frequency: Tensor


def train(choice: Choice, fold: Fold, seed: int, steps: int) -> tuple[UNet, dict[int, UNet], float]:
    """The network after so many steps, its averages by length, and CPU seconds."""
    torch.manual_seed(seed)
    config = replace(
        load_config("tiny", None, [])[0].model,
        told=choice.told,
        latent_patch=choice.patch,
        condition_channels=36 if choice.thick_hu else 4,
    )
    net = build_unet(config).train()
    averages = {n: copy.deepcopy(net).eval() for n in EMA_STEPS}
    bridge = Evidence()
    weigh = {
        "channel": channel_weigh(fold.channel),
        "none": channel_weigh(torch.ones(4)),
        "frequency": frequency_weigh(fold.frequency),
    }[choice.weights]
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: 0.5 + 0.5 * math.cos(math.pi * k / steps))
    rng, draw = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    begun = time.process_time()
    for step in range(steps):
        clean, given, told = batch_of(choice, fold, rng)
        loss = bridge.loss_of(as_model(net, told), clean, given, weigh, draw)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        for length, average in averages.items():
            keep = min(1 - 1 / length, (1 + step) / (10 + step))
            with torch.no_grad():
                for own, new in zip(average.parameters(), net.parameters(), strict=True):
                    own.lerp_(new, 1 - keep)
    return net.eval(), averages, time.process_time() - begun


def as_model(net: UNet, told: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as an objective calls it."""
    return (lambda x, t: net(x, t, told)) if net.config.told else net


def batch_of(choice: Choice, fold: Fold, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Clean latents, condition with whatever else is given, and the facts told, of random windows."""
    clean, given, told = [], [], []
    for _ in range(choice.batch):
        case = fold.train[rng.integers(len(fold.train))]
        axis = FLIPS[rng.integers(3)] if choice.flips else ""
        thin = case.latents[f"thin{axis}"]
        depth, crop = min(choice.window, thin.shape[1]), min(choice.crop, *thin.shape[2:])
        z, y, x = (int(rng.integers(n - k + 1)) for n, k in zip(thin.shape[1:], (depth, crop, crop), strict=True))
        part = (slice(None), slice(z, z + depth), slice(y, y + crop), slice(x, x + crop))
        clean.append(whitened(thin[part], fold))
        given.append(condition_of(case, choice, fold, part, axis))
        told.append(case.told[:, part[1]])
    return tuple(torch.from_numpy(np.stack(each)) for each in (clean, given, told))  # type: ignore[return-value]


def whitened(latent: NDArray[np.float32], fold: Fold) -> NDArray[np.float32]:
    return whitened_of(latent, fold.mean, fold.std)


def condition_of(case: Case, choice: Choice, fold: Fold, part: Any, axis: str = "") -> NDArray[np.float32]:
    own = whitened(case.latents[f"{choice.start}{axis}"][part], fold)
    return np.concatenate([own, case.thick[axis][part]]) if choice.thick_hu else own


@torch.no_grad()
def changes(net: UNet, choice: Choice, fold: Fold, cases: list[Case]) -> list[NDArray[np.float32]]:
    """D of one step less D of the condition, in HU, of every case."""
    found = []
    for case in cases:
        given = torch.from_numpy(condition_of(case, choice, fold, (slice(None),) * 4))[None]
        model = as_model(net, torch.from_numpy(case.told)[None])
        y = Evidence().mean_of(model, given)[0].numpy()
        latent = y * fold.std[:, None, None, None] + fold.mean[:, None, None, None]
        found.append(decoded(fold.vae, latent, case) - decoded(fold.vae, case.latents[choice.start], case))
    return found


def decoded(vae: Vae, latent: NDArray[np.float32], case: Case) -> NDArray[np.float32]:
    depth, height, width = case.truth.shape
    unit = np.asarray(vae.decode(torch.from_numpy(latent), (depth, height, width)))
    return np.clip(WINDOW.from_unit(unit), WINDOW.lower, WINDOW.upper)


def scored(net: UNet, choice: Choice, fold: Fold) -> dict[str, float]:
    """PSNR in dB of the held-out cases, with the share of the change that errs least on the other held-out ones."""
    wanted = power = 0.0
    for case, change in zip(fold.gain, changes(net, choice, fold, fold.gain), strict=True):
        wanted += float(((case.truth - case.starts[choice.start]) * change).sum(dtype=np.float64))
        power += float(np.square(change).sum(dtype=np.float64))
    gain = min(1.0, max(0.0, wanted / power)) if power else 1.0
    values, start, explained = [], [], []
    for case, change in zip(fold.score, changes(net, choice, fold, fold.score), strict=True):
        base = case.starts[choice.start]
        values.append(psnr(np.clip(base + np.float32(gain) * change, WINDOW.lower, WINDOW.upper), case.truth))
        start.append(psnr(base, case.truth))
        explained.append(float(np.corrcoef((case.truth - base).ravel(), change.ravel())[0, 1]))
    return {
        "psnr_db": statistics.fmean(values),
        "start_db": statistics.fmean(start),
        "share": gain,
        "correlation": statistics.fmean(explained),
    }


def psnr(found: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
    return 10 * math.log10(WINDOW.width**2 / float(np.mean(np.square(found - truth), dtype=np.float64)))


def fold_of(seed: int, options: argparse.Namespace) -> Fold:
    """Phantoms of a seed: to train on, to fit the share on, to score."""
    vae, refiner = load_vae("tiny"), RefinerFile.of("default")

    def cases(part: int, count: int) -> list[Case]:
        first = 10_000 * seed + 1000 * part
        numbers = range(first, first + count)
        return [make_case(vae, refiner, n, options.size, options.slices, part == 0) for n in numbers]

    training, gain, score = (cases(part, n) for part, n in enumerate((options.patients, 2, options.held_out)))
    every = np.concatenate([case.latents["thin"].reshape(4, -1) for case in training], axis=1)
    mean, std = every.mean(axis=1), every.std(axis=1)
    windows = [torch.from_numpy(whitened_of(case.latents["thin"][:, 2:6], mean, std)) for case in training[:4]]
    half = WINDOW.width / 2
    channel = channel_power(vae.decode_slab, windows, mean.tolist(), std.tolist(), hu_per_unit=half, seed=seed)
    frequency = frequency_power(vae, training, std)
    return Fold(vae, training, gain, score, mean, std, torch.tensor(channel), frequency)


def whitened_of(
    latent: NDArray[np.float32], mean: NDArray[np.float32], std: NDArray[np.float32]
) -> NDArray[np.float32]:
    return (latent - mean[:, None, None, None]) / std[:, None, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small phantoms, few steps: shows that it runs, no more")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--slices", type=int, default=80)
    parser.add_argument("--patients", type=int, default=14, help="to train on")
    parser.add_argument("--held-out", type=int, default=4, help="to score on")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--only", default=",".join(CHOICES))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.size, options.slices, options.patients, options.held_out = 2, 32, 44, 2, 1
        options.seeds = "1"
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    with tempfile.TemporaryDirectory() as scratch:
        keep = options.keep or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)
        by_seed = {seed: of_seed(int(seed), options, keep) for seed in options.seeds.split(",")}
    table = compared(by_seed)
    found = {
        "by_seed": by_seed,
        "choices": table,
        "settings": {k: v for k, v in vars(options).items() if k not in ("quick", "keep")},
        "device": f"cpu, {os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("torch", "numpy")},
    }
    for name, row in table.items():
        apart = f"{row['over']:+.3f} ± {row['sd']:.3f}"
        print(f"{name:20s} {row['psnr_db']:7.3f} dB   over {BASES.get(name, 'base'):8s} {apart}")
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "learned_choices-cpu.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, sort_keys=True))


def of_seed(seed: int, options: argparse.Namespace, keep: Path) -> dict[str, Any]:
    """Every choice's figures of one seed, kept as they are finished."""
    path = keep / f"seed-{seed}.json"
    rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    wanted = [name for name in options.only.split(",") if name not in rows]
    fold = fold_of(seed, options) if wanted else None
    for name in wanted:
        assert fold is not None
        net, averages, seconds = train(CHOICES[name], fold, seed, options.steps)
        rows[name] = {**scored(net, CHOICES[name], fold), "cpu_seconds": round(seconds, 1)}
        if name == "base":
            for length, average in averages.items():
                rows[f"ema_{length}"] = scored(average, CHOICES[name], fold)
        path.write_text(json.dumps(rows, indent=1))
        print(f"seed {seed} {name}: {rows[name]}", flush=True)
    return rows


def compared(by_seed: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over seeds, and the difference to the choice's base in the same seed."""
    rows = list(by_seed.values())
    table = {}
    for name in (n for n in rows[0] if all(n in row for row in rows)):
        base = BASES.get(name, "base")
        apart = [row[name]["psnr_db"] - row[base]["psnr_db"] for row in rows if base in row]
        table[name] = {
            "psnr_db": round(statistics.fmean(row[name]["psnr_db"] for row in rows), 3),
            "over_start_db": round(statistics.fmean(row[name]["psnr_db"] - row[name]["start_db"] for row in rows), 3),
            "over": round(statistics.fmean(apart), 3) if apart else math.nan,
            "sd": round(statistics.stdev(apart), 3) if len(apart) > 1 else 0.0,
        }
    return table


if __name__ == "__main__":
    main()
