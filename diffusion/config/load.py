"""Load and check a training configuration: presets, YAML and overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion.config.classic_yaml import from_classic, is_classic
from diffusion.config.overrides import apply, known_keys, nearest, parse_overrides
from diffusion.config.schema import (
    BudgetConfig,
    DataConfig,
    LossConfig,
    ObjectiveConfig,
    OptimiserConfig,
    TrainConfig,
    ValidationConfig,
)
from diffusion.networks import MODEL_PRESETS
from latentcache import InputError
from latentcache.storage import YAML_BYTES, parse_yaml


def check(config: TrainConfig) -> None:
    """Refuse values that would only fail later, or silently do nothing.

    Raises:
        InputError: The value, what is expected, and the key to set.
    """
    multiple = config.model.in_plane_multiple
    crops = {"data.crop": config.data.crop}
    for key, crop in crops.items():
        if crop is not None and (crop < multiple or crop % multiple):
            raise InputError(
                f"{key} = {crop}",
                expected=f"a multiple of {multiple} latents, the U-Net's in-plane step",
                remedy=f"Use --set {key}={max(multiple, crop // multiple * multiple)}.",
            )
    at_least_one = {
        "data.batch_size": config.data.batch_size,
        "data.windows_per_volume": config.data.windows_per_volume,
        "data.window": 1 if config.data.window is None else config.data.window,
        "data.depth_bucket": config.data.depth_bucket,
        "optimiser.samples_per_step": config.optimiser.samples_per_step,
        "optimiser.epochs": config.optimiser.epochs,
        "losses.every": config.losses.every,
        "losses.slab": config.losses.slab,
        "budget.checkpoint_every_steps": config.budget.checkpoint_every_steps,
        "budget.log_every_steps": config.budget.log_every_steps,
        "parallel.shutdown_timeout_s": config.parallel.shutdown_timeout_s,
    }
    for key, value in at_least_one.items():
        if value < 1:
            raise InputError(f"{key} = {value}", expected="1 or more", remedy=f"Use --set {key}=1 or a larger number.")
    if config.losses.perceptual_weight > 0 and not config.losses.vgg19_weights:
        raise InputError(
            f"losses.perceptual_weight = {config.losses.perceptual_weight} without VGG19 weights",
            expected="torchvision's VGG19 state dict (vgg19-*.pth)",
            remedy="Name the file with --set losses.vgg19_weights=FILE, or --set losses.perceptual_weight=0.",
        )


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuse bfloat16 on a CPU, where weight gradients of 3-D convolutions can be uninitialised memory.

    Raises:
        InputError: See infra/decisions/0011-bf16-on-cpu.md for the measurement.
    """
    if config.optimiser.precision == "bf16" and device.type == "cpu":
        raise InputError(
            "optimiser.precision = bf16 on a CPU",
            expected="fp32 there: in bfloat16 some weight gradients of 3-D convolutions are not computed at all",
            remedy="Use --set optimiser.precision=auto (bf16 on a GPU, fp32 on a CPU).",
        )


PRESETS: dict[str, TrainConfig] = {
    "tiny": TrainConfig(
        preset="tiny",
        model=MODEL_PRESETS["tiny"],
        data=DataConfig(window=8, windows_per_volume=8, batch_size=4, readers=1, read_ahead=2),
        optimiser=OptimiserConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=20, epochs=10_000, samples_per_step=4
        ),
        validation=ValidationConfig(every_epochs=20, images_every=0),
        budget=BudgetConfig(max_seconds=150.0, checkpoint_every_steps=100),
    ),
    "medium": TrainConfig(
        preset="medium",
        model=replace(MODEL_PRESETS["medium"], activation_checkpointing=True),
        losses=LossConfig(ms_ssim_weight=0.1, crop=32),
        budget=BudgetConfig(checkpoint_every_steps=500),
    ),
    "classic": TrainConfig(
        preset="classic",
        # As its model had it; without, both image losses and a batch of 2 do not fit 80 GB.
        model=replace(MODEL_PRESETS["classic"], activation_checkpointing=True),
        data=DataConfig(alignment="latent", batch_size=2),
        objective=ObjectiveConfig("epsilon"),
        losses=LossConfig(measure="latent", perceptual_weight=0.1, ms_ssim_weight=0.1),
        optimiser=OptimiserConfig(learning_rate=1e-4, epochs=100, samples_per_step=16),
    ),
}
"""``tiny`` trains on a laptop's CPU in minutes; ``medium`` is the recommended run; ``classic`` has the settings of the
system that this one replaces (epsilon, 100 epochs, batch 2 with accumulation 8, both image losses)."""


def train_preset(name: str) -> TrainConfig:
    """A preset by name.

    Raises:
        InputError: No preset of that name.
    """
    if name not in PRESETS:
        raise InputError(
            f"preset {name}",
            expected=f"one of {', '.join(PRESETS)}",
            remedy=f"The nearest is {nearest(name, PRESETS)}.",
        )
    return PRESETS[name]


def load_config(
    preset: str | None = None,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    base: TrainConfig | None = None,
) -> tuple[TrainConfig, list[str]]:
    """A preset, then a YAML file (ours or the classic form), then ``section.key=value`` overrides.

    Args:
        base: Replaces the preset: the configuration that a resumed run kept.

    Returns:
        The configuration, and notes that a person should read: what a classic file holds that has no place here.

    Raises:
        InputError: An unreadable file, an unknown key or a value of the wrong kind.
    """
    values: dict[str, Any] = {}
    notes: list[str] = []
    named: str | None = None
    if file is not None:
        values = read_yaml(Path(file))
        if is_classic(values):
            values, notes = from_classic(values, Path(file).name)
        named = values.pop("preset", None)
    config = base or train_preset(preset or named or "medium")
    config = apply(config, values, f"the file {Path(file).name}" if file else "the preset")
    config = apply(config, parse_overrides(overrides, known_keys(TrainConfig)), "--set")
    check(config)
    return config, notes


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(YAML_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the configuration file cannot be read ({type(error).__name__})",
            expected="a YAML file",
            remedy="Check the path given with --config, and its indentation.",
        ) from error
    values = parse_yaml(text, "the configuration file")
    if not isinstance(values, Mapping):
        raise InputError(
            "a configuration file without keys", expected="a YAML mapping", remedy="For example: data: {window: 16}."
        )
    return dict(values)
