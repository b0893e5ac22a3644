from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from diffusion.config import TrainConfig, from_dict, load_config, to_dict
from diffusion.config.load import PRESETS, train_preset
from diffusion.config.overrides import known_keys
from latentcache import InputError


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_survives_json(name: str) -> None:
    preset = train_preset(name)
    assert preset.preset == name
    assert from_dict(json.loads(json.dumps(to_dict(preset)))) == preset


def test_classic_is_the_predecessors_recipe() -> None:
    classic = train_preset("classic")
    assert (classic.objective.name, classic.optimiser.epochs, classic.data.batch_size) == ("epsilon", 100, 2)
    assert classic.optimiser.samples_per_step == 16
    assert classic.optimiser.learning_rate == 1e-4
    assert (classic.losses.perceptual_weight, classic.losses.ms_ssim_weight) == (0.1, 0.1)
    assert classic.model.latent_patch == 2


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "preset: tiny\ndata: {window: 12, crop: null}\noptimiser: {learning_rate: 3e-4, betas: [0.9, 0.95]}\n"
    )
    config, notes = load_config(None, file, ["data.window=20", "max_seconds=7", "model.multipliers=[1, 2]",
                                             "model.attention_levels=[1]"])  # fmt: skip
    assert notes == []
    assert (config.preset, config.data.window, config.data.crop) == ("tiny", 20, None)
    assert config.optimiser.learning_rate == 3e-4, "YAML reads 3e-4 as text"
    assert config.optimiser.betas == (0.9, 0.95)
    assert config.budget.max_seconds == 7.0, "a section may be left out where the key is unique"
    assert config.model.multipliers == (1, 2)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("validaton.every_epochs=2", "validation.every_epochs"),
        ("validaton.every=2", "validation.every_epochs"),
        ("validation.every_epoch=2", "validation.every_epochs"),
        ("optimizer.learning_rate=1", "optimiser.learning_rate"),
        ("learning_rat=1", "optimiser.learning_rate"),
        ("training.batch_size=4", "data.batch_size"),
        ("seeed=4", "seed"),
        ("data.window.size=4", "data.window"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, nearest: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("tiny", None, [override])
    assert nearest in str(caught.value)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optimiser.lr=3", "optimiser.learning_rate"),
        ("lr=3", "optimiser.learning_rate"),
        ("model.lr=3", "optimiser.learning_rate"),
        ("training.wd=3", "optimiser.weight_decay"),
        ("optimiser.grad_clip=1", "optimiser.clip_norm"),
        ("data.bs=4", "data.batch_size"),
        ("trainer.amp=1", "optimiser.precision"),
    ],
)
def test_another_librarys_word_names_the_key_that_it_stands_for(override: str, nearest: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("tiny", None, [override])
    assert str(caught.value).endswith(f"The nearest known key is {nearest}.")


@settings(deadline=None)
@given(st.sampled_from(known_keys(TrainConfig)), st.integers(0, 30), st.sampled_from("qzx"))
def test_no_misspelt_key_passes(key: str, place: int, letter: str) -> None:
    wrong = key[:place] + letter + key[place:]
    if wrong not in known_keys(TrainConfig):
        with pytest.raises(InputError):
            load_config("tiny", None, [f"{wrong}=1"])


@pytest.mark.parametrize(
    "override",
    ["data.window=many", "data.batch_size=1.5", "data.alignment=voxel", "optimiser.compile=1", "data=3", "data.window",
     "data.window=0", "losses.every=0", "optimiser.betas=[0.9]", "seed=null"],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused(override: str) -> None:
    with pytest.raises(InputError):
        load_config("tiny", None, [override])


def test_a_crop_that_the_network_cannot_halve_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.crop=16"):
        load_config("medium", None, ["data.crop=20"])


def test_perceptual_loss_without_weights_is_never_a_silent_skip() -> None:
    with pytest.raises(InputError, match="vgg19_weights"):
        load_config("classic", None, [])
    config, _ = load_config("classic", None, ["losses.perceptual_weight=0"])
    assert config.losses.ms_ssim_weight == 0.1


def test_unknown_preset_and_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nearest is medium"):
        load_config("mediun")
    with pytest.raises(InputError, match="cannot be read"):
        load_config(None, tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="without keys"):
        load_config(None, tmp_path / "list.yaml")
