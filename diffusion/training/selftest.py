"""Six quick checks that training can work here: data, model, losses, forward, training step, memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.config import TrainConfig
from diffusion.data import Batch, PairStream, Step
from diffusion.losses import DecodedPart, Decoder, ImageLosses, VGG19Features
from diffusion.networks import ThickSlices, UNet, build_unet, informed
from diffusion.objectives import OBJECTIVES, build_objective
from diffusion.sampling import Interpolator
from diffusion.training.distributed import World, default_device
from diffusion.training.loop import LoopConfig, Trainer, Watch, to_device
from diffusion.training.resources import estimate_step, memory_present
from diffusion.training.throughput import Meter
from diffusion.training.train import latent_loss
from diffusion.training.validation import generators
from latentcache import InputError, LatentStore

STEPS = 8
FALLEN_TO = 0.95
"""Share of the first loss that is left after STEPS steps on one batch; an untrained network starts at about 1."""
MOVED_SHARE = 1e-4
"""Of a tensor's size, root mean square: hundreds of float32 roundings, and far less than a step of any preset."""
SAME_IMAGE = 1e-6


@dataclass(frozen=True)
class CheckResult:
    """One check: what was found if it passed, what went wrong if not."""

    name: str
    passed: bool
    detail: str
    seconds: float


class SelfTest:
    """The six checks over one store and one configuration; later ones use what earlier ones built.

    Args:
        store: Synthetic, or the user's; nothing is written to it.
        decoder: The VAE's, for the image losses; without it a stand-in that enlarges latents is used, and reported.
    """

    def __init__(self, store: LatentStore, config: TrainConfig, decoder: Decoder | None = None) -> None:
        self.store, self.config, self.decoder = store, config, decoder
        self.world = World(device=default_device())
        self.batch: Batch = {}
        self.stream: PairStream | None = None
        self.unet: UNet | None = None

    def run(self) -> list[CheckResult]:
        """All six, in order; a failed one does not keep the independent ones from running."""
        checks: tuple[Callable[[], str], ...] = (
            self.data, self.model, self.losses, self.forward, self.training_step, self.memory,
        )  # fmt: skip
        return [self._one(check) for check in checks]

    def data(self) -> str:
        """A batch of the training split: whitened, finite, of one depth."""
        self.stream = PairStream(
            self.store,
            self.config.data,
            split="train",
            samples_per_step=self.config.data.batch_size,
            seed=self.config.seed,
            in_plane_multiple=self.config.model.in_plane_multiple,
            told=self.config.model.told,
        )
        if not self.stream.pairs:
            raise InputError(
                f"no usable training pair ({self.stream.left_out or 'none at all'})",
                expected="at least one",
                remedy="Run `ctpipe encode STORE`.",
            )
        self.batch = to_device(next(self.stream.fixed_batches(1)), self.world.device)
        spread = float(self.batch["thin"].std())
        if not 0.1 < spread < 10:
            raise InputError(
                f"whitened latents with a standard deviation of {spread:.3g}",
                expected="about 1",
                remedy="Run `ctpipe stats STORE` and look for outliers.",
            )
        shape = tuple(self.batch["thin"].shape)
        return f"{len(self.stream.pairs)} pairs; a batch is {shape}, whitened to std {spread:.2f}"

    def model(self) -> str:
        """The U-Net of the configuration."""
        torch.manual_seed(self.config.seed)
        self.unet = build_unet(self.config.model).to(self.world.device)
        count = sum(p.numel() for p in self.unet.parameters())
        return f"{count / 1e6:.1f}M parameters ({self.config.preset}) on {self.world.device.type}"

    def losses(self) -> str:
        """Every objective's loss is finite; identical images have no image loss, unlike ones some, of either kind.

        VGG19 is initialised at random: what is tested is that the loss runs and tells images apart.
        """
        unet, batch = self._built()
        values = []
        for name in OBJECTIVES:
            random = generators(batch["noise_seed"], self.world.device)
            network = informed(unet, batch.get("told"))
            terms = build_objective(name).loss(network, batch["thin"], batch["condition"], batch["mask"], random)
            value = float(terms.per_sample.detach().mean())
            _require(value == value and abs(value) != float("inf"), f"a {name} loss of {value}", "a finite loss")
            values.append(f"{name} {value:.3f}")
        torch.manual_seed(self.config.seed)
        vgg = VGG19Features().to(self.world.device)
        part = DecodedPart(slab=2, crop=16)
        images = ImageLosses(self.decoder or _enlarge, [0.0] * 4, [1.0] * 4, vgg=vgg, part=part)
        found: list[tuple[float, float]] = []
        one = slice(0, 1)
        for prediction in (batch["thin"][one], batch["condition"][one]):
            random = generators(batch["noise_seed"][one], self.world.device)
            with torch.no_grad():
                terms_of_one = images(
                    prediction, batch["thin"][one], batch["mask"][one], torch.ones(1, dtype=torch.bool), random
                )
            found.append((float(terms_of_one.ms_ssim.mean()), float(terms_of_one.perceptual.mean())))
        for name, (equal, unlike) in zip(("1 - MS-SSIM", "VGG19 distance"), zip(*found, strict=True), strict=True):
            text = f"{name} of {equal:.3g} and {unlike:.3g}"
            _require(abs(equal) < SAME_IMAGE < unlike, text, "0 for equal images and more for unlike ones")
        through = "the VAE's decoder" if self.decoder else "a stand-in decoder (no VAE given)"
        return (
            ", ".join(values) + f"; 1 - MS-SSIM {found[1][0]:.3f}, VGG19 distance {found[1][1]:.3g} through {through}"
        )

    def forward(self) -> str:
        """A forward pass; an untrained bridge gives the condition back."""
        unet, batch = self._built()
        begin = time.perf_counter()
        with torch.no_grad():
            network = informed(unet, batch.get("told"))
            out = network(torch.cat([batch["thin"], batch["condition"]], dim=1), torch.full_like(batch["weight"], 0.5))
        seconds = time.perf_counter() - begin
        _require(out.shape == batch["thin"].shape, f"an output of shape {tuple(out.shape)}", "the latents' own shape")
        raw = batch["condition"][0].cpu()
        model = Interpolator.from_parts(unet, build_objective("bridge"), [0.0] * 4, [1.0] * 4)
        z_mm = 4.0 * np.arange(len(raw[0]))
        found = model.generate_latent(raw, thick=ThickSlices(0.0, 5.0, len(raw[0]), 5.0), z_mm=z_mm)
        same = torch.allclose(torch.as_tensor(found), raw, atol=1e-5)
        _require(same, "an untrained bridge that changes its condition", "the condition itself")
        return f"{seconds:.2f} s for {tuple(batch['thin'].shape)}; an untrained bridge returns its condition"

    def training_step(self) -> str:
        """Steps on one batch with one noise, at the configuration's own rate: the loss falls, and every weight moves.

        After STEPS every tensor has had a gradient, zero-initialised layers notwithstanding; each then must have moved
        by MOVED_SHARE of its size, and the loss have fallen to FALLEN_TO of what it was.
        """
        unet, batch = self._built()
        rate = replace(self.config.optimiser, warmup_steps=0, schedule="constant", steps=STEPS, ema_std=0)
        loop = LoopConfig(rate, self.config.validation, self.config.budget, self.config.parallel)
        loss = latent_loss(build_objective(self.config.objective.name), self.world.device)
        with tempfile.TemporaryDirectory() as folder:
            meter = Meter(self.world.device, None, None)
            stream = _OneBatch(batch)
            trainer = Trainer(unet, loss, stream, loop, Path(folder), world=self.world, watch=Watch(meter=meter))
            before = {name: p.detach().clone() for name, p in unet.named_parameters()}
            begin = time.perf_counter()
            found = [trainer.training_step(stream.step())[0] for _ in range(STEPS)]
            seconds = (time.perf_counter() - begin) / STEPS
        with torch.no_grad():
            found.append(float(loss(unet, batch, STEPS).per_sample.mean()))
        _require(
            found[-1] <= FALLEN_TO * found[0],
            f"a loss of {found[0]:.4g} that is {found[-1]:.4g} after {STEPS} steps on one batch",
            f"at most {FALLEN_TO} of what it was",
            "Check optimiser.learning_rate; a loss that does not fall on one batch falls nowhere.",
        )
        still = [name for name, p in unet.named_parameters() if _share(before[name], p) < MOVED_SHARE]
        _require(
            not still,
            f"{len(still)} of {len(before)} tensors that did not move, the first {still[:1]}",
            f"every tensor to move by {MOVED_SHARE} of its size in {STEPS} steps",
            "Check optimiser.learning_rate, and that the layer takes part in the forward pass.",
        )
        return (
            f"loss {found[0]:.4f} to {found[-1]:.4f} in {STEPS} steps on one batch; all {len(before)} tensors moved; "
            f"{seconds:.2f} s a step"
        )

    def memory(self) -> str:
        """Compare what a step of this configuration needs with what is free."""
        assert self.stream is not None, "the data check failed"
        need = estimate_step(self.config, self.stream.shapes[0], self.world)
        present = memory_present(self.world.device)
        text = f"a step needs about {need.peak_bytes / 2**30:.2f} GiB, {present / 2**30:.1f} GiB are free"
        _require(need.peak_bytes <= present, text, "enough memory; `ctpipe doctor` says what to change")
        return text

    def _built(self) -> tuple[UNet, Batch]:
        _require(self.unet is not None and bool(self.batch), "no batch or no model", "the checks before this one")
        assert self.unet is not None
        return self.unet, self.batch

    def _one(self, check: Callable[[], str]) -> CheckResult:
        begin = time.perf_counter()
        name = check.__name__.replace("_", " ")
        try:
            detail, passed = check(), True
        except (InputError, RuntimeError, AssertionError) as error:
            detail, passed = str(error), False
        return CheckResult(name, passed, detail, time.perf_counter() - begin)


class _OneBatch:
    """A stream that gives one and the same batch for ever."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield self.step()

    def step(self) -> Step:
        return Step(0, 0, 1, len(self.batch["weight"]), 1, iter([self.batch]))

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: every position is the same."""


def _share(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return how far a tensor moved, as a share of its size; a tensor that began at zero counts as one of size 1e-3."""
    size = before.square().mean().sqrt().clamp(min=1e-3)
    return float((after.detach() - before).square().mean().sqrt() / size)


def _require(
    condition: bool, found: str, expected: str, remedy: str = "Report this with `ctpipe doctor --json`."
) -> None:
    if not condition:
        raise InputError(found, expected=expected, remedy=remedy)


def _enlarge(latents: torch.Tensor) -> torch.Tensor:
    """Replacement of a decoder: the mean over channels at voxel size."""
    size: tuple[Any, ...] = tuple(4 * n for n in latents.shape[2:])
    return torch.nn.functional.interpolate(latents, size=size).mean(1, keepdim=True).tanh()
