from __future__ import annotations

from pathlib import Path

import pytest

from diffusion.config import TrainConfig, load_config
from diffusion.config.classic_yaml import MAPPING, NO_PLACE
from diffusion.config.overrides import known_keys
from latentcache import InputError


def test_the_shipped_classic_file_gives_the_classic_settings(repo_root: Path) -> None:
    config, notes = load_config(None, repo_root / "infra" / "classic.yaml")
    assert config.preset == "classic"
    assert config.objective.name == "epsilon"
    assert config.objective.settings == {"min_snr_gamma": 5.0}
    assert (config.optimiser.epochs, config.optimiser.learning_rate) == (100, 1e-4)
    assert (config.data.batch_size, config.optimiser.samples_per_step) == (2, 16), "batch 2, accumulation 8"
    assert (config.losses.perceptual_weight, config.losses.ms_ssim_weight, config.losses.every) == (0.1, 0.1, 10)
    assert config.model.latent_patch == 2
    assert config.validation.every_epochs == 5
    assert any("scaling_factor" in note for note in notes), "a key without a place is said, not swallowed"


def test_every_mapped_key_exists() -> None:
    known = set(known_keys(TrainConfig))
    assert {target for target, _ in MAPPING.values()} <= known
    assert not set(MAPPING) & set(NO_PLACE)


def test_a_misspelt_validation_key_is_an_error(tmp_path: Path) -> None:
    """The predecessor read an unknown key as "never validate"."""
    file = tmp_path / "classic.yaml"
    file.write_text("training: {validate_evry: 5}\nloss: {perceptual_weight: 0}\n")
    with pytest.raises(InputError, match=r"training\.validate_every"):
        load_config(None, file)


def test_an_unknown_section_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "classic.yaml"
    file.write_text("training: {num_epochs: 3}\nlosses: {perceptual_weight: 0}\n")
    with pytest.raises(InputError, match="section losses"):
        load_config(None, file)


def test_accumulation_counts_with_the_batch(tmp_path: Path) -> None:
    file = tmp_path / "classic.yaml"
    file.write_text(
        "data: {batch_size: 4, num_slices: 50}\ntraining: {gradient_accumulation_steps: 3, mixed_precision: bf16}\n"
        "loss: {perceptual_weight: 0}\ndiffusion: {prediction_type: v_prediction}\n"
    )
    config, notes = load_config(None, file)
    assert (config.optimiser.samples_per_step, config.data.window) == (12, 13)
    assert (config.optimiser.precision, config.objective.name) == ("bf16", "v")
    assert notes == []
