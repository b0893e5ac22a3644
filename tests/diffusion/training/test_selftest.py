"""The self-test fails where training would not learn: a rate of nothing, a layer that takes no part, a blind loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusion.config import load_config
from diffusion.data import make_store
from diffusion.losses import image_losses as losses
from diffusion.training import SelfTest
from diffusion.training.selftest import CheckResult


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., SelfTest]:
    def make(*more: str) -> SelfTest:
        model = ("width=8", "multipliers=[1,2]", "groups=4", "heads=2", "attention_levels=[1]", "time_embedding=16")
        config, _ = load_config(
            "tiny",
            None,
            [*(f"model.{one}" for one in model), "model.latent_patch=1", "optimiser.learning_rate=3e-3", *more],
        )
        test = SelfTest(make_store(tmp_path / "store"), config)
        assert test._one(test.data).passed
        assert test._one(test.model).passed
        return test

    return make


def step_of(test: SelfTest) -> CheckResult:
    return test._one(test.training_step)


@pytest.mark.parametrize("name", ["bridge", "epsilon"])
def test_a_trainer_that_learns_passes(check: Callable[..., SelfTest], name: str) -> None:
    found = step_of(check(f"objective.name={name}"))
    assert found.passed, found.detail
    assert "on one batch; all " in found.detail


@pytest.mark.parametrize("rate", ["1e-30", "1e-8"])
def test_a_rate_that_teaches_nothing_fails(check: Callable[..., SelfTest], rate: str) -> None:
    found = step_of(check(f"optimiser.learning_rate={rate}"))
    assert not found.passed
    assert "a loss of" in found.detail


def test_a_layer_that_takes_no_part_fails(check: Callable[..., SelfTest]) -> None:
    test = check("optimiser.weight_decay=0")
    assert test.unet is not None
    test.unet.forgotten = nn.Parameter(torch.ones(3))
    found = step_of(test)
    assert not found.passed
    assert "1 of " in found.detail
    assert "forgotten" in found.detail


def test_both_image_losses_are_tried(check: Callable[..., SelfTest], monkeypatch: pytest.MonkeyPatch) -> None:
    test = check()
    found = test._one(test.losses)
    assert found.passed, found.detail
    assert "VGG19 distance" in found.detail

    def blind(vgg: Any, image: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return image.new_zeros(len(image))

    monkeypatch.setattr(losses, "perceptual_distance", blind)
    broken = test._one(test.losses)
    assert not broken.passed
    assert "VGG19 distance of 0 and 0" in broken.detail
