"""The predecessor's YAML (sections model, data, training, loss, diffusion) onto ours, key by key.

Every classic key is either mapped, or known to have no place here and said so in a note, or an error that names the
nearest known key: the system that this one replaces read a misspelt validation key as "never validate".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusion.config.overrides import unknown
from latentcache import InputError

CLASSIC_SECTIONS = ("model", "data", "training", "loss", "diffusion")
MARKERS = ("training", "loss", "diffusion")
"""Sections that only a classic file has."""


def same(value: Any) -> Any:
    return value


def window_of(value: Any) -> Any:
    """Latent slices that hold a depth in thin slices; 0 or none is the whole volume."""
    return -(-int(value) // 4) if value else None


MAPPING: dict[str, tuple[str, Callable[[Any], Any]]] = {
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
    "training.mixed_precision": (
        "optimiser.precision",
        lambda v: {"no": "fp32", False: "fp32", True: "auto"}.get(v, v),
    ),
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


def is_classic(values: Mapping[str, Any]) -> bool:
    """Whether a configuration file has the predecessor's sections."""
    return any(section in values for section in MARKERS)


def from_classic(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """A classic mapping as ours, on top of the preset ``classic``.

    Returns:
        The nested mapping for ``config_keys.apply``, and a note for every key that has no place here.

    Raises:
        InputError: A key that the classic form does not have.
    """
    known = [*MAPPING, *NO_PLACE, ACCUMULATION, MIN_SNR]
    ours: dict[str, Any] = {"preset": "classic"}
    notes: list[str] = []
    flat = {
        f"{section}.{name}": v for section, entries in values.items() for name, v in _section(section, entries).items()
    }
    for key, value in flat.items():
        if key in MAPPING:
            target, convert = MAPPING[key]
            _put(ours, target, convert(value))
        elif key in NO_PLACE:
            notes.append(f"{key} is not used: {NO_PLACE[key]}")
        elif key == MIN_SNR:
            _put(ours, "objective.settings", {"min_snr_gamma": value})
        elif key != ACCUMULATION:
            raise unknown(key, known, f"the classic file {where}")
    if ACCUMULATION in flat or "data.batch_size" in flat:
        # One optimiser step sees batch x accumulation samples; ours counts those, whatever the number of devices.
        _put(ours, "optimiser.samples_per_step", int(flat.get("data.batch_size", 2)) * int(flat.get(ACCUMULATION, 8)))
    return ours, notes


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
