"""Configuration of a training run: data, model, objective, losses, optimiser, validation and budget, and the presets.

A run's configuration is a preset, then a YAML file, then ``--set section.key=value``; a key that does not exist is an
error that names the nearest one. Configs of the model stand beside the model in ``model_config``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from diffusion.config.overrides import apply
from diffusion.networks import UNetConfig


@dataclass(frozen=True)
class DataConfig:
    """Settings of a batch. Depths and crops are in latents (4 voxels along each axis).

    Attributes:
        encode_key: Which latents; none takes the store's only encode key.
        alignment: ``pixel``: the thick HU interpolated, then encoded; ``latent``: the thick latent, interpolated.
        start: ``interpolated``: the condition is as ``alignment`` says; ``refined``: the latent of the refiner's slices
            (role ``refined_on_thin``), which lie on the thin grid already.
        augment: ``flip-x``, ``flip-y`` or both by comma: a training sample is drawn from the pair as it is and as it
            was cached mirrored (`ctpipe encode --augment`), with equal chances.
        window: Depth of random windows; none trains on whole volumes, cropped to a multiple of ``depth_bucket``.
        crop: Side of a random in-plane crop; none takes the whole plane.
        windows_per_volume: Samples that a pair gives in an epoch.
        batch_size: Samples of one forward pass on one device; memory follows from it, results do not.
        mixed_numerics: Train on latents that were computed in different dtypes or on different kinds of device.
        readers: Threads that read ahead; ``read_ahead``: batches that they may be ahead.
    """

    encode_key: str | None = None
    alignment: Literal["pixel", "latent"] = "pixel"
    start: Literal["interpolated", "refined"] = "interpolated"
    augment: str = ""
    window: int | None = None
    depth_bucket: int = 8
    crop: int | None = None
    windows_per_volume: int = 1
    batch_size: int = 1
    mixed_numerics: bool = False
    readers: int = 4
    read_ahead: int = 4


@dataclass(frozen=True)
class ObjectiveConfig:
    """``name``: epsilon, v, flow or bridge; ``settings``: what that objective takes, e.g. ``min_snr_gamma``."""

    name: str = "bridge"
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LossConfig:
    """Settings of the losses; image losses are taken on a latent slab decoded through the frozen VAE decoder.

    Attributes:
        measure: ``image``: the latent loss weighs each channel by what its error does to the image, in HU², measured on
            the decoder at the start of the run; ``latent``: all alike; ``auto``: ``image`` where a decoder is at hand.
        probes: Training windows that the decoder is probed at.
        image_l2_weight: Weight of the decoded slab's mean squared error, of unit scale; 0 switches it off.
        perceptual_weight: Weight of the VGG19 feature distance; 0 switches it off.
        vgg19_weights: torchvision's VGG19 state dict; needed where ``perceptual_weight`` is not 0.
        ms_ssim_weight: Weight of 1 - MS-SSIM; 0 switches it off.
        slice_fraction: Share of the slab's slices that the perceptual term looks at.
        every: Steps from one look at decoded slabs to the next.
        slab: Latent slices that are decoded; ``crop``: in-plane side of what is decoded, none for the whole plane.
    """

    measure: Literal["auto", "image", "latent"] = "auto"
    probes: int = 4
    image_l2_weight: float = 0.0
    perceptual_weight: float = 0.0
    vgg19_weights: str | None = None
    ms_ssim_weight: float = 0.0
    every: int = 10
    slice_fraction: float = 0.2
    slab: int = 4
    crop: int | None = None


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW with warm-up, then a cosine or constant learning rate.

    Attributes:
        epochs: Length of the run and of the cosine, unless ``steps`` is given.
        samples_per_step: Samples of one optimiser step over all devices and accumulated batches (batch 2 with
            accumulation 8 is 16), so that the number of devices changes no result.
        final_fraction: Where the cosine ends, as a share of ``learning_rate``.
        ema_std: Relative width of the power-function EMA (Karras et al. 2023, section 3.1); 0 switches it off.
        precision: ``auto`` is bf16 autocast on a GPU and fp32 on a CPU.
        compile: ``torch.compile`` of every kind of block once (``blocks``, or true), of the ``whole`` network, or none.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    warmup_steps: int = 100
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = 0.01
    epochs: int = 100
    steps: int | None = None
    samples_per_step: int = 8
    clip_norm: float = 1.0
    ema_std: float = 0.1
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: Literal[False, True, "blocks", "whole"] = False


@dataclass(frozen=True)
class ValidationConfig:
    """When the held-out pairs are looked at, and what follows from it.

    Attributes:
        every_epochs: 0 switches validation off, and with it early stopping and the best checkpoint.
        images_every: Every so many validations, held-out pairs are sampled and decoded too; 0 never.
        max_batches: Batches of the latent validation loss; none takes the whole split.
        metric: What ``best`` and early stopping look at: ``val_loss``, ``val_rms_hu`` (the error weighed by channel in
            HU) or a figure of the image validation, such as ``val_psnr_db``. ``auto`` is ``val_psnr_db`` where held-out
            pairs can be sampled and decoded, else ``val_rms_hu`` where the decoder's weights are known. ``mode``:
            whether less or more of it is better; ``auto``: less of a loss or an error, more of all else.
        patience: Validations without improvement before the run stops; 0 never stops early.
    """

    every_epochs: int = 1
    images_every: int = 5
    max_batches: int | None = None
    metric: str = "auto"
    mode: Literal["auto", "min", "max"] = "auto"
    patience: int = 0
    pairs: int = 2
    sampler: str | None = None
    sampling_steps: int | None = None


@dataclass(frozen=True)
class BudgetConfig:
    """Limits of a session of the run, and how often it saves.

    No limit changes a learning rate or an order: the weights after step N are the same whatever stopped the run,
    and a longer session goes on from there. ``max_seconds`` decides by the clock, ``max_cpu_seconds`` by the
    processor time of this process, which a loaded machine stretches less, how many steps are taken: two runs under one
    of them agree step for step but need not end at the same step.
    """

    max_steps: int | None = None
    max_seconds: float | None = None
    max_cpu_seconds: float | None = None
    checkpoint_every_steps: int = 500
    log_every_steps: int = 1


@dataclass(frozen=True)
class ParallelConfig:
    """Settings of training on several devices.

    Attributes:
        strategy: ``ddp`` copies the model to every device, ``fsdp`` shards weights, gradients and optimiser.
        shutdown_timeout_s: Seconds that the processes have after SIGTERM to save and end before they are killed; a
            pod's grace period must be longer.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    shutdown_timeout_s: int = 300


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    preset: str = "medium"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    model: UNetConfig = field(default_factory=UNetConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """JSON-ready; :func:`from_dict` reads it back."""
    return asdict(config)


def from_dict(values: Mapping[str, Any], where: str = "config.json") -> TrainConfig:
    """A configuration that a run wrote."""
    return apply(TrainConfig(), values, where)
