"""Train the VAE's decoder, or the whole VAE, on volumes under one window, in the common training loop."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.workflows.training.refiner import prepare_run

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diffusion.data import Step
    from diffusion.training import Progress, Terms, TrainSummary
    from pipeline.vae import CropSource, Perceptual, VaeTrainConfig, VaeWeights
    from pipeline.volume import Window

Named = tuple[str, Any]
"""A volume's name, which holds nothing of a patient, and its (D, H, W) intensities in [-1, 1]."""
READ_AHEAD = 4
HELD_OUT_VOLUMES = 4


@dataclass(frozen=True)
class VaeTrainingJob:
    """A VAE to train.

    Attributes:
        out: The weights to write (.safetensors); the run with its checkpoints is the folder beside it, ``.run``.
        config: What is trained, and how.
        vae: Weights to start from; needed for the decoder alone.
        store: Train on its training split and validate on its validation split; None: on phantoms.
        window: Name or ``C:W`` of the HU window.
        vgg: VGG19's state dict, where the perceptual weight is positive.
        resume: Continue the run.
    """

    out: Path
    config: VaeTrainConfig
    vae: Path | None = None
    store: str | None = None
    window: str = "soft-tissue"
    vgg: Path | None = None
    device: str = "cpu"
    private: str | None = None
    resume: bool = False

    @property
    def run(self) -> Path:
        """The folder of the run: checkpoints and log."""
        return self.out.with_suffix(".run")


@dataclass(frozen=True)
class TrainedVae:
    """Result of training; ``weights`` is None where it was interrupted: resume it."""

    weights: VaeWeights | None
    summary: TrainSummary


def run_vae_training(job: VaeTrainingJob, on_progress: Callable[[Progress], None] | None = None) -> TrainedVae:
    """Train, and write the averaged weights of the best validation once the run is finished.

    Raises:
        InputError: A decoder without weights to start from, a perceptual weight without VGG19, another run in the
            folder, a resumed run of other settings, or no volume to train or validate on.
        NonFiniteError: A loss or gradient is not finite; names the step and the volume. Checkpoints stay.
    """
    import torch

    from latentcache import InputError, check_bf16_convolutions, compute_dtype, full_float32
    from pipeline.vae import CropSource, VaeInTraining, load_weights
    from pipeline.volume import Window

    config, device = job.config, torch.device(job.device)
    if config.perceptual_weight > 0 and job.vgg is None:
        raise InputError(
            "a perceptual weight and no perceptual network", expected="VGG19 weights", remedy="Give --vgg PATH."
        )
    if compute_dtype(config.precision, job.device) == "bfloat16":
        if device.type == "cpu":
            raise InputError(
                "--dtype bf16 on a CPU",
                expected="fp32 there: in bfloat16 some weight gradients of 3-D convolutions are not computed at all",
                remedy="Leave --dtype out (auto).",
            )
        check_bf16_convolutions(device)
    elif config.precision == "fp32":
        full_float32()
    start = None if job.vae is None else load_weights(job.vae)
    torch.manual_seed(config.seed)
    module = VaeInTraining(config, start).to(device)
    window = Window.parse(job.window)
    volumes = phantoms(window, config.seed) if job.store is None else series_of(job, job.store, window)
    prepare_run(job.run, job.resume)
    trainer = _trainer(
        job,
        module,
        CropSource(volumes.train, config.crop_zyx, config.seed),
        validation_crops(volumes.held_out, config),
        {"config": _facts(config), "start": start.file_sha256 if start else "", "volumes": volumes.names},
    )
    trainer.on_progress = on_progress
    summary = trainer.run(job.resume and trainer.checkpoints.path("last") is not None)
    if summary.stopped_by == "signal":
        return TrainedVae(None, summary)
    return TrainedVae(_write_best(job, start, module), summary)


def _trainer(job: VaeTrainingJob, module: Any, crops: CropSource, held_out: list[Any], identity: dict[str, Any]) -> Any:
    """The common loop around the VAE's losses."""
    import torch

    from diffusion.config import BudgetConfig, OptimiserConfig, ValidationConfig
    from diffusion.training import LoopConfig, Trainer, Watch, World

    config = job.config
    settings = LoopConfig(
        optimiser=OptimiserConfig(
            learning_rate=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=1e-4,
            warmup_steps=config.warmup,
            steps=config.steps,
            samples_per_step=1,
            ema_std=config.ema_std,
        ),
        validation=ValidationConfig(metric="val_psnr_db"),
        budget=BudgetConfig(checkpoint_every_steps=config.validate_every, log_every_steps=10),
    )
    return Trainer(
        module,
        partial(crop_loss, config=config, perceptual=_perceptual(job)),
        CropStream(crops, config.validate_every),
        settings,
        job.run,
        world=World(device=torch.device(job.device)),
        identity={**identity, "window": job.window},
        watch=Watch(validate=partial(reconstruction_figures, crops=held_out)),
    )


class CropStream:
    """One crop a step, read ahead by a thread; an epoch is the steps between two validations."""

    def __init__(self, crops: CropSource, steps_in_epoch: int) -> None:
        self.crops, self.steps_in_epoch = crops, steps_in_epoch
        self.number = 0

    def __len__(self) -> int:
        return self.steps_in_epoch

    def __iter__(self) -> Iterator[Step]:
        from diffusion.data import Step, prefetch

        reader = prefetch(self._tasks(self.number), 1, READ_AHEAD)
        try:
            while True:
                epoch, index = divmod(self.number, self.steps_in_epoch)
                self.number += 1
                yield Step(epoch, index, self.steps_in_epoch, 1, 1, islice(reader, 1))
        finally:
            reader.close()  # type: ignore[attr-defined]

    def _tasks(self, number: int) -> Iterator[Callable[[], dict[str, Any]]]:
        while True:
            yield partial(as_batch, self.crops, number)
            number += 1

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def as_batch(crops: CropSource, number: int) -> dict[str, Any]:
    """A crop as the loop wants it; its noise follows from its number."""
    import torch

    name, crop = crops.crop(number)
    return {"crop": crop[None], "noise_seed": number, "study_key": [name], "weight": torch.ones(1)}


def crop_loss(
    module: Any, batch: dict[str, Any], step: int, *, config: VaeTrainConfig, perceptual: Perceptual | None
) -> Terms:
    """The loss of one crop, its summands beside it for the log."""
    import torch

    from diffusion.training import Terms
    from pipeline.vae import reconstruction_losses

    x = batch["crop"]
    random_numbers = torch.Generator().manual_seed(config.seed * 1_000_003 + batch["noise_seed"])
    compression = module.network.architecture.compression
    shape = (1, module.network.architecture.latent_channels, *(n // compression for n in x.shape[2:]))
    noise = torch.randn(shape, generator=random_numbers).to(x.device)
    terms = reconstruction_losses(module, x, noise, step / config.steps, config, perceptual)
    return Terms(terms.pop("loss")[None], {name: value.detach()[None] for name, value in terms.items()})


def reconstruction_figures(module: Any, step: int, *, crops: list[Tensor]) -> dict[str, float]:
    """PSNR in dB and mean absolute error, over the window, of held-out crops encoded and decoded without noise."""
    import torch

    device = next(module.parameters()).device
    squared = absolute = 0.0
    with torch.no_grad():
        for crop in crops:
            x = crop[None].to(device)
            difference = module.network.decode(module.network.encode(x)[0]).float() - x
            squared += float(difference.square().mean()) / len(crops)
            absolute += float(difference.abs().mean()) / len(crops)
    return {"val_psnr_db": -10 * math.log10(max(squared, 1e-12)), "val_loss": absolute}


def validation_crops(volume_of: Callable[[int], Named], config: VaeTrainConfig) -> list[Tensor]:
    """The crops that every validation looks at, (1, d, h, w) in [0, 1], from the held-out volumes in turn."""
    from pipeline.vae import CropSource

    each = -(-config.validation_crops // HELD_OUT_VOLUMES)
    source = CropSource(volume_of, config.crop_zyx, config.seed, per_volume=each, pool=1)
    return [source.crop(number)[1] for number in range(config.validation_crops)]


@dataclass(frozen=True)
class Volumes:
    """Endless volumes by number, to train on and to validate on; ``names`` tells two such sequences apart."""

    train: Callable[[int], Named]
    held_out: Callable[[int], Named]
    names: str


def phantoms(window: Window, seed: int) -> Volumes:
    """Thin and thick series of synthetic patients that no seed of a user makes, to train on and to validate on."""
    from pipeline.phantom import make_patient

    def volume_of(number: int, first: int) -> Named:
        patient = first + 100_000 * seed + number // 2 + 1
        made = make_patient(patient, 96, 48, "APE" if patient % 2 else "non-APE")
        return f"phantom {patient}", window.to_unit((made.thick if number % 2 else made.thin).hu)

    return Volumes(partial(volume_of, first=2_000_000), partial(volume_of, first=1_000_000_000), "phantoms")


def series_of(job: VaeTrainingJob, store: str, window: Window) -> Volumes:
    """The series of a store's training split in an order of their own for each epoch, and of its validation split.

    Raises:
        InputError: A split without a usable series.
    """
    from latentcache import InputError, LatentStore
    from pipeline.identity import PrivateStore
    from pipeline.reading import read_series

    pointers = PrivateStore.open(store, job.private)
    keys: dict[str, list[str]] = {"train": [], "val": []}
    for series in LatentStore.open(store).series():
        if series.status == "ok" and series.split in keys:
            keys[series.split].append(series.series_key)
    for split, found in keys.items():
        if not found:
            raise InputError(
                f"no usable series in the {split} split",
                expected="one at least, to train on and to validate on",
                remedy="Ingest more patients, or assign them with `ctpipe ingest --splits CSV`.",
            )

    def volume_of(number: int, split: str) -> Named:
        epoch, index = divmod(number, len(keys[split]))
        order = random.Random(f"{job.config.seed} {epoch}").sample(sorted(keys[split]), len(keys[split]))
        return order[index], window.to_unit(read_series(pointers.pointer(order[index])).hu)

    names = hashlib.sha256(json.dumps({k: sorted(v) for k, v in keys.items()}, sort_keys=True).encode()).hexdigest()
    return Volumes(partial(volume_of, split="train"), partial(volume_of, split="val"), names[:16])


def _perceptual(job: VaeTrainingJob) -> Perceptual | None:
    if job.config.perceptual_weight <= 0:
        return None
    from diffusion.losses import load_vgg19, perceptual_distance

    network = load_vgg19(job.vgg, job.device)
    return lambda ours, theirs: perceptual_distance(network, ours[:, 0], theirs[:, 0]).mean()


def _write_best(job: VaeTrainingJob, start: VaeWeights | None, module: nn.Module) -> VaeWeights:
    """Write the averaged weights of the best checkpoint; a decoder's file names the encoder that it belongs to."""
    from diffusion.runs import CheckpointFolder
    from pipeline.vae import encoder_metadata, save_weights

    folder = CheckpointFolder(job.run)
    contents = folder.load("best" if folder.path("best") else "last")
    state = {
        name.removeprefix("network."): tensor
        for name, tensor in contents.average.items()
        if name.startswith("network.")
    }
    metadata = {"recipe": json.dumps({**_facts(job.config), "window": job.window}, sort_keys=True)}
    if job.config.part == "decoder" and start is not None:
        metadata |= encoder_metadata(start)
    architecture: Any = module.network.architecture  # type: ignore[union-attr]
    return save_weights(state, architecture, job.out, metadata)


def _facts(config: VaeTrainConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps({**asdict(config), "architecture": config.architecture.to_dict()}))
    return plain
