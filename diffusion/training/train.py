"""From a latent store to a trained run: what is fixed before the first step, and what a step of latents is."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from diffusion.config import LossConfig, TrainConfig, check, check_precision, to_dict
from diffusion.data import Batch, PairStream, ProcessShare, only_refiner
from diffusion.losses import DecodedPart, Decoder, ImageLosses, channel_power, load_vgg19
from diffusion.networks import UNet, build_unet, channels_last, informed
from diffusion.objectives import Objective, build_objective
from diffusion.runs import RUN_CARD, CheckpointFolder, RunCard, pin_snapshot, reopen
from diffusion.training.compilation import check_compilation
from diffusion.training.distributed import World, join
from diffusion.training.loop import LoopConfig, Terms, Trainer, TrainSummary, Watch
from diffusion.training.recompute import fit_recomputation
from diffusion.training.resources import StepEstimate, check_resources, estimate_step, remedies
from diffusion.training.throughput import Meter, Progress, measured_matmul_rate
from diffusion.training.validation import ValidateImages, chosen_metric, generators, validation
from latentcache import InputError, LatentStore, check_bf16_convolutions, full_float32

log = logging.getLogger("ctpipe.train")


CONFIG = "config.json"
PROBE_SIDE = 16
"""Latents: 64 voxels."""


def train(
    store: LatentStore,
    run_dir: str | Path,
    config: TrainConfig,
    *,
    decoder: Decoder | None = None,
    validate: ValidateImages | None = None,
    refiner_sha256: str | None = None,
    resume: bool | Literal["if-there"] = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainSummary:
    """Train a model on a store's latents; see ``loop`` for the loop and ``checkpoint`` for what is saved.

    Args:
        store: Any snapshot; a new run is pinned to it, a resumed run reopens the one it began with.
        decoder: The frozen VAE's decoder, for the image losses.
        validate: Samples, decodes and scores held-out pairs.
        resume: Continue the run in ``run_dir``; without it the folder must hold no run. ``if-there``: continue one, or
            begin it.
        refiner_sha256: The refiner that the run keeps for use with its model; the store's must be the same.

    Raises:
        InputError: Settings, store or device that cannot work, before the first step; see also ``Trainer.run``.
    """
    run_dir, world = Path(run_dir), join()
    check(config)
    check_precision(config, world.device)
    check_arithmetic(config, world.device)
    if resume == "if-there":  # one answer for all ranks, before the first of them writes a card
        resume = world.any((run_dir / RUN_CARD).exists())
    if resume:
        card, stream, held_out = _reopened(store, run_dir, config, world)
    else:
        card, stream, held_out = _begun(store, run_dir, config, world, decoder, refiner_sha256)
    objective = card.build_objective()
    need = estimate_step(config, stream.shapes[0], world, decoder)
    check_resources(need, config, world.device, run_dir)
    torch.manual_seed(config.seed)
    unet = _network(card, config, world, stream, need)
    images = image_losses(config.losses, decoder, card, world.device)
    looked_at = replace(config.validation, metric=chosen_metric(config.validation, card, validate))
    rate = measured_matmul_rate(world.device, torch.bfloat16 if world.device.type == "cuda" else torch.float32)
    trainer = Trainer(
        unet,
        latent_loss(objective, world.device, images, config.losses.every),
        stream,
        LoopConfig(config.optimiser, looked_at, config.budget, config.parallel),
        run_dir,
        world=world,
        identity=identity(card, config),
        watch=Watch(
            validation(held_out, objective, card, looked_at, validate, world, len(stream)) if held_out else None,
            Meter(world.device, need.forward_flops_per_sample, rate),
            on_progress,
        ),
    )
    try:
        return trainer.run(resume=bool(resume) and CheckpointFolder(run_dir).path("last") is not None)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"out of memory at step {trainer.step}, where about {need.peak_bytes / 2**30:.1f} GiB were expected",
            expected="a step that fits beside whatever else uses the device",
            remedy="; ".join(remedies(config)) + "; then --resume.",
        ) from error


Opened = tuple[RunCard, PairStream, PairStream | None]
"""A run's card, its training stream and the held-out one."""


def _reopened(store: LatentStore, run_dir: Path, config: TrainConfig, world: World) -> Opened:
    """Open the run in ``run_dir`` at the snapshot that it is pinned to."""
    card = RunCard.read(run_dir)
    store = reopen(store, card)
    if world.rank == 0:
        pin_snapshot(store, card)
    return card, *_streams(store, config, world)


def _begun(
    store: LatentStore,
    run_dir: Path,
    config: TrainConfig,
    world: World,
    decoder: Decoder | None,
    refiner_sha256: str | None,
) -> Opened:
    """Begin a run: fix its card, pin its snapshot, write both.

    Raises:
        InputError: A folder that holds a run already, no usable pair, or another refiner than the store's.
    """
    if (run_dir / RUN_CARD).exists():
        raise InputError(
            "a run directory that holds a run already",
            expected="a new directory, or --resume",
            remedy="Add --resume to continue it, or choose another directory.",
        )
    stream, held_out = _streams(store, config, world)
    power = decoder_power(store, stream, config, decoder, world)
    card = new_card(store, stream, config, power)
    check_same_refiner(card, refiner_sha256)
    world.barrier()  # or a slower rank would find the card that the first one writes, and take the run for another
    if world.rank == 0:
        pin_snapshot(store, card)
        card.write(run_dir)
        (run_dir / CONFIG).write_text(json.dumps(to_dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return card, stream, held_out


def _streams(store: LatentStore, config: TrainConfig, world: World) -> tuple[PairStream, PairStream | None]:
    """Both streams; pairs that are left out are logged once."""
    stream, held_out = open_streams(store, config, world)
    if world.rank == 0 and stream.left_out:
        log.warning("of the train split, %d pairs are used and left out are %s", len(stream.pairs), reasons(stream))
    return stream, held_out


def _network(card: RunCard, config: TrainConfig, world: World, stream: PairStream, need: StepEstimate) -> UNet:
    """The run's U-Net on the world's device, in the layout and with the recomputation that suit it."""
    unet = build_unet(card.unet_config).to(world.device)
    if world.device.type == "cuda":
        channels_last(unet)
    if config.model.activation_checkpointing == "auto":
        batch, bf16 = config.data.batch_size, world.device.type == "cuda"
        fit_recomputation(unet, batch, stream.shapes[0], need, world.device, bf16=bf16)
    return unet


def check_arithmetic(config: TrainConfig, device: torch.device) -> None:
    """See that the device computes what the configuration asks for, before the first step.

    Raises:
        InputError: bf16 convolutions that are wrong here, or a compilation that cannot run.
    """
    if config.optimiser.compile:
        check_compilation()
    if config.optimiser.precision == "fp32":
        full_float32()
    elif device.type == "cuda":
        check_bf16_convolutions(device)


def open_streams(store: LatentStore, config: TrainConfig, world: World) -> tuple[PairStream, PairStream | None]:
    """The training split as steps, and the validation split unless validation is switched off.

    Raises:
        InputError: A split without usable pairs, with what was left out and why.
    """
    common: dict[str, Any] = {
        "seed": config.seed,
        "share": ProcessShare(world.rank, world.size, pin_memory=world.device.type == "cuda"),
        "in_plane_multiple": config.model.in_plane_multiple,
        "told": config.model.told,
    }
    stream = PairStream(store, config.data, split="train", samples_per_step=config.optimiser.samples_per_step, **common)
    require_pairs(stream, "Encode more pairs (`ctpipe encode STORE`) or assign some with `ctpipe ingest --splits CSV`.")
    if config.validation.every_epochs == 0:
        return stream, None
    held_out = PairStream(store, replace(config.data, windows_per_volume=1), split="val", **common)
    require_pairs(
        held_out,
        "Assign patients to it with `ctpipe ingest DATASET STORE --splits CSV` (split `val`), or train without "
        "validation: --set validation.every_epochs=0.",
    )
    return stream, held_out


def require_pairs(stream: PairStream, remedy: str) -> None:
    """Refuse a split in which there is nothing to train or validate on."""
    if stream.pairs:
        return
    why = reasons(stream) or "it has no pairs at all"
    raise InputError(f"no usable pair in the {stream.split} split ({why})", expected="at least one", remedy=remedy)


def reasons(stream: PairStream) -> str:
    """Return how many pairs are left out, for which reason."""
    return ", ".join(f"{count} ({reason})" for reason, count in stream.left_out.items())


def decoder_power(
    store: LatentStore, stream: PairStream, config: TrainConfig, decoder: Decoder | None, world: World
) -> list[float] | None:
    """HU² by channel of a unit of squared whitened error, equal on every rank; None where the loss weighs all alike.

    Raises:
        InputError: ``losses.measure`` is ``image``, and there is no decoder.
        NonFiniteError: A probe of the decoder's Jacobian is not finite.
    """
    settings = config.losses
    if settings.measure == "latent" or config.objective.settings.get("channel_weights") is not None:
        return None
    if decoder is None:
        if settings.measure == "image":
            raise InputError(
                "losses.measure = image without a VAE decoder",
                expected="the decoder of the VAE that encoded the store",
                remedy="Name it with --vae, or set losses.measure=latent.",
            )
        log.warning("no VAE decoder at hand: the loss weighs all latent channels alike, whatever the image makes of it")
        return None
    data = replace(config.data, windows_per_volume=1, batch_size=1, crop=probe_side(config))
    probed = PairStream(store, data, seed=config.seed, in_plane_multiple=config.model.in_plane_multiple)
    latents = [
        batch["thin"][0, :, : settings.slab].to(world.device) for batch in probed.fixed_batches(limit=settings.probes)
    ]
    half = store.encoding(stream.encode_key).window_width / 2
    mean, std = ([float(v) for v in values] for values in (stream.mean, stream.std))
    power = channel_power(decoder, latents, mean, std, hu_per_unit=half, seed=config.seed)
    # Ranks may differ in the last digit, and must not.
    shared = world.sum(torch.tensor(power, dtype=torch.float64, device=world.device)) / world.size
    return [float(v) for v in shared.tolist()]


def probe_side(config: TrainConfig) -> int:
    """In-plane side in latents of the windows that the decoder is probed at: enough for its statistics, and cheap."""
    multiple = config.model.in_plane_multiple
    side = max(multiple, PROBE_SIDE // multiple * multiple)
    return side if config.data.crop is None else min(side, config.data.crop)


def new_card(store: LatentStore, stream: PairStream, config: TrainConfig, power: list[float] | None = None) -> RunCard:
    """Return the run's card: data, whitening, model and objective, with the decoder's power by channel."""
    settings = dict(config.objective.settings)
    if power is not None:
        settings["channel_weights"] = [float(f"{v:.4g}") for v in np.array(power) / np.mean(power)]
    objective = build_objective(config.objective.name, **settings)
    if "residual_std" not in settings:
        settings["residual_std"] = residual_std(store, config)
        objective = build_objective(config.objective.name, **settings)
    return RunCard(
        encode_key=stream.encode_key,
        encoding=store.encoding(stream.encode_key).to_json(),
        snapshot=store.snapshot,
        store_fingerprint=store.secret_fingerprint,
        alignment=config.data.alignment,
        whitening={"mean": [float(v) for v in stream.mean], "std": [float(v) for v in stream.std]},
        model=config.model.to_dict(),
        objective={"name": config.objective.name, "settings": objective.settings()},
        preset=config.preset,
        depth_window=config.data.window,
        refiner_sha256=only_refiner(stream.pairs),
        extra={
            "run_id": uuid.uuid4().hex[:16],
            "seed": config.seed,
            "train_pairs": len(stream.pairs),
            "hu2_per_unit_by_channel": power,
            # A latent slice covers four slices; generation of a series without a store asks for this spacing.
            "thin_spacing_mm": round(stream.thin_spacing_mm, 4),
        },
    )


def check_same_refiner(card: RunCard, refiner_sha256: str | None) -> None:
    """Refuse a refiner at hand that is not the one that made the store's refined latents.

    Raises:
        InputError: The two differ, or the run does not start from refined slices.
    """
    if refiner_sha256 is None or refiner_sha256 == card.refiner_sha256:
        return
    raise InputError(
        f"the refiner {refiner_sha256[:12]}, where the run's latents are "
        + (card.refiner_sha256[:12] or "not refined"),
        expected="the refiner that `ctpipe encode STORE --refiner` was given, and --set data.start=refined",
        remedy="Name that one, or encode with this one: `ctpipe encode STORE --refiner RUN --refresh`.",
    )


def residual_std(store: LatentStore, config: TrainConfig, batches: int = 16) -> float:
    """Root mean square of whitened (clean - condition) over fixed windows of the training split.

    Every rank reads the same windows, so that all agree without a word. At least 1e-3: where the condition already is
    the target there is nothing to scale.
    """
    data = replace(config.data, windows_per_volume=1, batch_size=1)
    stream = PairStream(store, data, seed=config.seed, in_plane_multiple=config.model.in_plane_multiple)
    squared = valid = 0.0
    for batch in stream.fixed_batches(limit=batches):
        difference = (batch["thin"] - batch["condition"]).double() * batch["mask"]
        squared += float(difference.square().sum())
        valid += float(batch["mask"].sum()) * batch["thin"].shape[1]
    return max(1e-3, float(np.sqrt(squared / valid)))


def latent_loss(
    objective: Objective, device: torch.device, images: ImageLosses | None = None, every: int = 10
) -> Callable[[nn.Module, Batch, int], Terms]:
    """The objective's loss of a batch and, every so many steps, the image losses of the clean latent it predicts.

    Each sample's time and noise, and the slab that is decoded, come from the sample's seed.
    """

    def batch_loss(model: nn.Module, batch: Batch, step: int) -> Terms:
        random = generators(batch["noise_seed"], device)
        network = informed(model, batch.get("told"))
        terms = objective.loss(network, batch["thin"], batch["condition"], batch["mask"], random)
        if images is None or step % every:
            return Terms(terms.per_sample)
        seen = images(terms.predicted_clean, batch["thin"], batch["mask"], terms.clean_is_meaningful, random)
        parts = {"diffusion": terms.per_sample, "ms_ssim": seen.ms_ssim, "perceptual": seen.perceptual, "l2": seen.l2}
        return Terms(terms.per_sample + seen.per_sample, parts)

    return batch_loss


def image_losses(
    settings: LossConfig, decoder: Decoder | None, card: RunCard, device: torch.device
) -> ImageLosses | None:
    """The image losses that the configuration asks for.

    Raises:
        InputError: They need a decoder or VGG19 weights that are not there; they are never skipped in silence.
    """
    if not (settings.ms_ssim_weight or settings.perceptual_weight or settings.image_l2_weight):
        return None
    if decoder is None:
        raise InputError(
            "image losses without a VAE decoder",
            expected="the decoder of the VAE that encoded the store",
            remedy="Name it with --vae, or set losses.ms_ssim_weight=0, losses.perceptual_weight=0 and "
            "losses.image_l2_weight=0.",
        )
    return ImageLosses(
        decoder,
        card.whitening["mean"],
        card.whitening["std"],
        ms_ssim_weight=settings.ms_ssim_weight,
        perceptual_weight=settings.perceptual_weight,
        l2_weight=settings.image_l2_weight,
        vgg=load_vgg19(settings.vgg19_weights, device) if settings.perceptual_weight > 0 else None,
        part=DecodedPart(settings.slab, settings.crop, settings.slice_fraction),
    )


def identity(card: RunCard, config: TrainConfig) -> dict[str, Any]:
    """Return what a resumed run must agree on, by name: all that changes a weight.

    Budgets, readers, validation, the batch of one device and their number do not.
    """
    named: dict[str, Any] = {
        "store snapshot": card.snapshot,
        "encode key": card.encode_key,
        "objective": card.objective,
        "whitening": card.whitening,
    }
    if card.refiner_sha256:
        named["refiner"] = card.refiner_sha256
    values = to_dict(config)
    free = {
        "data.batch_size",
        "data.mixed_numerics",
        "data.readers",
        "data.read_ahead",
        "optimiser.epochs",
        "optimiser.steps",
        "optimiser.compile",
    }
    for section in ("data", "model", "losses", "optimiser"):
        named |= {f"{section}.{k}": v for k, v in values[section].items() if f"{section}.{k}" not in free}
    named["seed"] = config.seed
    plain: dict[str, Any] = json.loads(json.dumps(named))
    return plain
