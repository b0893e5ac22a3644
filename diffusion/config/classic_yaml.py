"""The predecessor's YAML onto ours, key by key: flat, or in sections model, data, training, loss and diffusion.

Every classic key is either mapped, or known to have no place here, or an error that names the nearest known key: the
system that this one replaces read a misspelt validation key as "never validate". A note reports what each key became.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffusion.config.overrides import convert, known_keys, unknown
from diffusion.config.schema import TrainConfig
from latentcache import InputError

CLASSIC_SECTIONS = ("model", "data", "training", "loss", "diffusion")
MARKERS = ("training", "loss", "diffusion")
"""Sections that only a classic file has."""


def same(value: Any) -> Any:
    """Return the value as it is."""
    return value


def window_of(value: Any) -> Any:
    """Latent slices that hold a depth in thin slices; 0 or none is the whole volume."""
    return -(-int(value) // 4) if value else None


def window_unless_whole(full_volumes: bool) -> int | None:
    """No window for whole volumes, else 16 latent slices: the 64 slices that the VAE was trained on."""
    if not isinstance(full_volumes, bool):
        raise ValueError("neither true nor false")
    return None if full_volumes else 16


def precision_of(value: Any) -> Any:
    """``fp32`` without mixed precision; float16 is never used (its range is too small), so it becomes ``auto``."""
    names = {"no": "fp32", "false": "fp32", "true": "auto", "fp16": "auto", "float16": "auto", "bfloat16": "bf16"}
    return names.get(str(value).lower(), value)


MAPPING: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "model.unet_model_channels": ("model.width", same),
    "model.latent_dim": ("model.latent_channels", same),
    "data.use_full_volumes": ("data.window", window_unless_whole),
    "training.gradient_checkpointing": ("model.activation_checkpointing", same),
    "loss.lambda_perceptual": ("losses.perceptual_weight", same),
    "loss.lambda_ssim": ("losses.ms_ssim_weight", same),
    "model.base_channels": ("model.width", same),
    "model.channel_mult": ("model.multipliers", same),
    "model.num_res_blocks": ("model.blocks_per_level", same),
    "model.attention_levels": ("model.attention_levels", same),
    "model.num_heads": ("model.heads", same),
    "model.time_embed_dim": ("model.time_embedding", same),
    "model.latent_channels": ("model.latent_channels", same),
    "model.latent_patch": ("model.latent_patch", same),
    "model.use_checkpoint": ("model.activation_checkpointing", same),
    "data.batch_size": ("data.batch_size", same),
    "data.num_workers": ("data.readers", same),
    "data.prefetch_factor": ("data.read_ahead", same),
    "data.num_slices": ("data.window", window_of),
    "training.num_epochs": ("optimiser.epochs", same),
    "training.max_steps": ("optimiser.steps", same),
    "training.learning_rate": ("optimiser.learning_rate", same),
    "training.weight_decay": ("optimiser.weight_decay", same),
    "training.betas": ("optimiser.betas", same),
    "training.warmup_steps": ("optimiser.warmup_steps", same),
    "training.lr_scheduler": ("optimiser.schedule", same),
    "training.max_grad_norm": ("optimiser.clip_norm", same),
    "training.mixed_precision": ("optimiser.precision", precision_of),
    "training.compile": ("optimiser.compile", same),
    "training.seed": ("seed", same),
    "training.checkpoint_every": ("budget.checkpoint_every_steps", same),
    "training.log_every": ("budget.log_every_steps", same),
    "training.validate_every": ("validation.every_epochs", same),
    "training.early_stopping_patience": ("validation.patience", same),
    "loss.perceptual_weight": ("losses.perceptual_weight", same),
    "loss.ssim_weight": ("losses.ms_ssim_weight", same),
    "loss.vgg_weights": ("losses.vgg19_weights", same),
    "loss.image_loss_every": ("losses.every", same),
    "loss.perceptual_slice_fraction": ("losses.slice_fraction", same),
    "diffusion.prediction_type": ("objective.name", lambda v: "v" if v == "v_prediction" else v),
    "diffusion.sampler": ("validation.sampler", same),
    "diffusion.num_inference_steps": ("validation.sampling_steps", same),
}


NO_PLACE: dict[str, str] = {
    "model.use_custom_maisi": "there is one VAE, that of the store's latents; `ctpipe encode --vae` names it",
    "model.checkpoint_path": "the VAE is named when the archive is encoded: `ctpipe encode STORE --vae {value}`",
    "data.dataset_path": "training reads latents: run `ctpipe ingest {value} STORE`, then "
    "`ctpipe encode STORE --vae {vae}`, and train on STORE",
    "data.data_source": "`ctpipe ingest` finds zips, folders and single DICOM files by itself",
    "data.resolution": "every series keeps its own grid; for in-plane crops set data.crop, in latents of 4 pixels",
    "model.vae_checkpoint": "the VAE is named at `ctpipe encode --vae`; training reads latents",
    "model.scaling_factor": "latents are whitened by their own moments; no scale factor is used",
    "model.in_channels": "follows from the latents and the condition",
    "model.out_channels": "follows from the latents",
    "data.root": "the store is named on the command line",
    "data.categories": "given at `ctpipe ingest --categories`",
    "data.window_center": "given at `ctpipe encode --window C:W`",
    "data.window_width": "given at `ctpipe encode --window C:W`",
    "data.train_split": "splits are made once, at `ctpipe ingest`",
    "data.val_split": "splits are made once, at `ctpipe ingest`",
    "data.test_split": "splits are made once, at `ctpipe ingest`",
    "training.output_dir": "the run directory is named on the command line",
    "training.ema_decay": "the EMA is of power-function form: set optimiser.ema_std",
    "diffusion.beta_schedule": "the epsilon objective has the cosine schedule",
    "diffusion.num_timesteps": "the cosine schedule is continuous; 1000 steps are its discrete form",
}
ACCUMULATION = "training.gradient_accumulation_steps"
MIN_SNR = "diffusion.min_snr_gamma"


@dataclass(frozen=True)
class Entry:
    """A key of a classic file: ``written`` as it is there, ``key`` as the tables above name it."""

    written: str
    key: str
    value: Any


KNOWN = (*MAPPING, *NO_PLACE, ACCUMULATION, MIN_SNR)
LEAVES = {key.rsplit(".", 1)[-1]: key for key in KNOWN}
"""Every classic key without its section: the names are unique, so that a flat file is as good as a nested one."""


def is_classic(values: Mapping[str, Any]) -> bool:
    """Whether a configuration file has the predecessor's form: its sections, or its keys where ours are not."""
    ours = set(known_keys(TrainConfig))
    for name, entries in values.items():
        if name in MARKERS or (name in LEAVES and name not in ours):
            return True
        inner = entries if isinstance(entries, Mapping) and name in CLASSIC_SECTIONS else {}
        if any(leaf in LEAVES and f"{name}.{leaf}" not in ours for leaf in inner):
            return True
    return False


def from_classic(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """A classic mapping as ours, on top of the preset ``classic``.

    Returns:
        The nested mapping for ``overrides.apply``, and a note per key: what it became, or why it has no place here.

    Raises:
        InputError: A key that the classic form does not have, two keys of one meaning, or a value that is none.
    """
    found: dict[str, Entry] = {}
    for entry in _entries(values, where):
        if entry.key in found:
            raise _twice(found[entry.key], entry, where)
        found[entry.key] = entry
    ours: dict[str, Any] = {"preset": "classic"}
    notes = [f"{where} has the predecessor's keys; what it leaves open comes from the preset classic"]
    taken: dict[str, Entry] = {}
    for key, entry in found.items():
        if key in NO_PLACE:
            notes.append(f"{entry.written} is not used: {_advice(entry, found)}")
        elif key != ACCUMULATION:
            target, value = _mapped(entry, where)
            if target in taken:
                raise _twice(taken[target], entry, where)
            taken[target] = entry
            _put(ours, target, value)
            notes.append(f"{entry.written} became {target} = {value}")
    batch, accumulation = found.get("data.batch_size"), found.get(ACCUMULATION)
    if accumulation is not None or batch is not None:
        # One optimiser step sees batch x accumulation samples; ours counts those, whatever the number of devices.
        of_batch = 2 if batch is None else convert(batch.value, int, batch.written, where)
        rounds = 8 if accumulation is None else convert(accumulation.value, int, accumulation.written, where)
        _put(ours, "optimiser.samples_per_step", of_batch * rounds)
        named = "gradient_accumulation_steps" if accumulation is None else accumulation.written
        notes.append(f"{named} became optimiser.samples_per_step = {of_batch * rounds} (batch {of_batch} x {rounds})")
    return ours, notes


def _entries(values: Mapping[str, Any], where: str) -> list[Entry]:
    """The keys of a flat or nested file; a key may stand in any section, since its name is unique."""
    entries: list[Entry] = []
    for name, value in values.items():
        if name in LEAVES and not isinstance(value, Mapping):
            entries.append(Entry(name, LEAVES[name], value))
            continue
        if name not in CLASSIC_SECTIONS and not isinstance(value, Mapping):
            raise unknown(name, list(LEAVES), f"the classic file {where}")
        for leaf, inner in _section(name, value).items():
            if leaf not in LEAVES:
                raise unknown(f"{name}.{leaf}", KNOWN, f"the classic file {where}")
            entries.append(Entry(f"{name}.{leaf}", LEAVES[leaf], inner))
    return entries


def _mapped(entry: Entry, where: str) -> tuple[str, Any]:
    """Our key and value."""
    if entry.key == MIN_SNR:
        return "objective.settings", {"min_snr_gamma": entry.value}
    target, conversion = MAPPING[entry.key]
    try:
        return target, conversion(entry.value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{entry.written} = {entry.value!r} in the classic file {where}",
            expected=f"a value that {target} can be made from",
            remedy="See infra/classic.yaml for an example.",
        ) from error


def _advice(entry: Entry, found: Mapping[str, Entry]) -> str:
    """Why a key has no place here, with the commands to run instead."""
    checkpoint = found.get("model.checkpoint_path") or found.get("model.vae_checkpoint")
    vae = shlex.quote(str(checkpoint.value)) if checkpoint and checkpoint.value else "PATH"
    return NO_PLACE[entry.key].format(value=shlex.quote(str(entry.value)), vae=vae)


def _twice(first: Entry, second: Entry, where: str) -> InputError:
    return InputError(
        f"{first.written} and {second.written} in the classic file {where}",
        expected="one of them: they mean the same",
        remedy=f"Remove {second.written}.",
    )


def _section(name: str, entries: Any) -> Mapping[str, Any]:
    if name not in CLASSIC_SECTIONS or not isinstance(entries, Mapping):
        raise InputError(
            f"section {name} of a classic file",
            expected=f"sections {', '.join(CLASSIC_SECTIONS)}, each with keys",
            remedy="See infra/classic.yaml for the whole form.",
        )
    return entries


def _put(place: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
