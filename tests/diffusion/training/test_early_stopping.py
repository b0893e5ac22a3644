from __future__ import annotations

import math

import pytest

from diffusion.config import ValidationConfig
from diffusion.training.early_stopping import Best
from latentcache import InputError


@pytest.mark.parametrize(
    ("metric", "mode", "lower_is_better"),
    [("val_loss", "auto", True), ("val_psnr_db", "auto", False), ("mae_hu", "min", True), ("val_loss", "max", False)],
)
def test_the_direction_follows_from_the_metric_unless_it_is_given(
    metric: str, mode: str, lower_is_better: bool
) -> None:
    best = Best(ValidationConfig(metric=metric, mode=mode))  # type: ignore[arg-type]
    assert best.take({metric: 2.0})
    assert best.take({metric: 1.0}) is lower_is_better
    assert best.take({metric: 3.0}) is not lower_is_better
    assert best.value == (1.0 if lower_is_better else 3.0)


def test_patience_counts_validations_without_improvement() -> None:
    best = Best(ValidationConfig(patience=2))
    taken = [best.take({"val_loss": v}) for v in (3.0, 2.0, 2.0)]
    assert (taken, best.given_up) == ([True, True, False], False), "as good as the best is no improvement"
    best.take({"val_loss": 2.5})
    assert best.given_up
    best.take({"val_loss": 1.0})
    assert not best.given_up


def test_without_patience_nothing_is_given_up() -> None:
    best = Best(ValidationConfig(patience=0))
    for value in range(20):
        best.take({"val_loss": float(value)})
    assert not best.given_up


def test_nan_is_never_the_best() -> None:
    best = Best(ValidationConfig())
    assert not best.take({"val_loss": math.nan})
    assert best.take({"val_loss": 5.0})
    assert not best.take({"val_loss": math.nan})
    assert best.value == 5.0


def test_a_metric_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(InputError, match=r"val_psnr_db.*val_loss, val_ssim"):
        Best(ValidationConfig(metric="val_psnr_db")).take({"val_loss": 1.0, "val_ssim": 0.9})


def test_a_resumed_run_waits_on() -> None:
    first, second = Best(ValidationConfig(patience=2)), Best(ValidationConfig(patience=2))
    for value in (1.0, 2.0):
        first.take({"val_loss": value})
    second.load_state_dict(first.state_dict())
    assert not second.take({"val_loss": 1.5})
    assert second.given_up
