from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffusion.config import TrainConfig, load_config
from diffusion.config.classic_yaml import MAPPING, NO_PLACE
from diffusion.config.overrides import known_keys
from latentcache import InputError


def test_the_shipped_classic_file_gives_the_classic_settings(repo_root: Path) -> None:
    config, notes = load_config(None, repo_root / "infra" / "classic.yaml", ["losses.vgg19_weights=vgg19.pth"])
    assert config.preset == "classic"
    assert config.objective.name == "epsilon"
    assert (config.optimiser.epochs, config.optimiser.learning_rate) == (100, 1e-4)
    assert (config.data.batch_size, config.optimiser.samples_per_step) == (2, 16), "batch 2, accumulation 8"
    assert (config.losses.perceptual_weight, config.losses.ms_ssim_weight, config.losses.every) == (0.1, 0.1, 10)
    assert config.model.latent_patch == 2
    assert config.model.activation_checkpointing
    assert any(note.startswith("checkpoint_path is not used") for note in notes), "reported, not swallowed"


GUIDE = """\
unet_model_channels: 192
latent_dim: 4
use_custom_maisi: true
checkpoint_path: "/models/autoencoder epoch273.pt"
data_source: zip
dataset_path: /data/APE
use_full_volumes: true
batch_size: 2
resolution: [512, 512]
num_epochs: 100
learning_rate: 1e-4
gradient_accumulation_steps: 8
mixed_precision: true
gradient_checkpointing: true
lambda_perceptual: 0.1
lambda_ssim: 0.1
"""
NESTED = """\
model: {unet_model_channels: 192, latent_dim: 4, use_custom_maisi: true, gradient_checkpointing: true,
        checkpoint_path: "/models/autoencoder epoch273.pt"}
data: {data_source: zip, dataset_path: /data/APE, use_full_volumes: true, batch_size: 2, resolution: [512, 512]}
training: {num_epochs: 100, learning_rate: 1e-4, gradient_accumulation_steps: 8, mixed_precision: true}
loss: {lambda_perceptual: 0.1, lambda_ssim: 0.1}
"""


@pytest.mark.parametrize("text", [GUIDE, NESTED], ids=["flat", "nested"])
def test_the_guides_own_keys_flat_and_nested(tmp_path: Path, text: str) -> None:
    """Each key of the predecessor's guide is taken and reported: what it became, or which command has its place."""
    file = tmp_path / "guide.yaml"
    file.write_text(text)
    config, notes = load_config(None, file, ["losses.vgg19_weights=vgg19.pth"])
    assert (config.preset, config.model.width, config.model.latent_channels) == ("classic", 192, 4)
    assert (config.data.window, config.data.batch_size, config.optimiser.samples_per_step) == (None, 2, 16)
    assert (config.optimiser.epochs, config.optimiser.learning_rate) == (100, 1e-4)
    assert (config.optimiser.precision, config.model.activation_checkpointing) == ("auto", True)
    assert (config.losses.perceptual_weight, config.losses.ms_ssim_weight) == (0.1, 0.1)
    for key in yaml_leaves(GUIDE):
        assert any(key in note.split(" became ")[0].split(" is not used")[0] for note in notes), f"{key} is reported"
    told = "\n".join(notes)
    assert "ctpipe ingest /data/APE STORE" in told
    assert "ctpipe encode STORE --vae '/models/autoencoder epoch273.pt'" in told


def yaml_leaves(text: str) -> list[str]:
    return [line.split(":")[0] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lamda_ssim: 0.1\nnum_epochs: 3\n", "lambda_ssim"),
        ("use_full_volumes: maybe\n", "use_full_volumes = 'maybe'"),
        ("num_epochs: 3\nbatch_size: two\n", "batch_size = 'two'"),
        ("num_epochs: 3\ntraining: {num_epochs: 4}\n", "num_epochs and training.num_epochs"),
        ("loss: {lambda_ssim: 0.1, ssim_weight: 0.2}\n", "loss.lambda_ssim and loss.ssim_weight"),
    ],
)
def test_a_classic_file_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "classic.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=re.escape(said)):
        load_config(None, file, ["losses.perceptual_weight=0"])


def test_patches_become_windows_and_our_own_form_stays_ours(tmp_path: Path) -> None:
    file = tmp_path / "classic.yaml"
    file.write_text("use_full_volumes: false\nmixed_precision: fp16\n")
    config, _ = load_config(None, file, ["losses.perceptual_weight=0"])
    assert (config.data.window, config.optimiser.precision) == (16, "auto")
    file.write_text("seed: 3\ndata: {batch_size: 2, window: 8}\nmodel: {latent_channels: 4}\n")
    config, notes = load_config(None, file)
    assert (config.preset, config.data.window, notes) == ("medium", 8, [])


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
    assert "data.num_slices became data.window = 13" in notes
    assert any("samples_per_step = 12 (batch 4 x 3)" in note for note in notes)
