"""The loss in the image's metric: weights from the decoder, in the run card, and what `best` looks at."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.config import TrainConfig, ValidationConfig, load_config
from diffusion.data import make_store
from diffusion.losses import DecodedPart, ImageLosses, channel_power
from diffusion.objectives import build_objective
from diffusion.runs import RunCard, read_log
from diffusion.training import train
from diffusion.training.early_stopping import Best
from latentcache import InputError, NonFiniteError

GAINS = torch.tensor([0.4, 0.1, 0.05, 0.02])


def linear(latents: Tensor) -> Tensor:
    """A decoder whose Jacobian is known: every voxel is the weighted sum of its latent's channels."""
    image = (latents * GAINS.reshape(1, -1, 1, 1, 1)).sum(1, keepdim=True)
    return F.interpolate(image, scale_factor=4.0)


def small(*more: str) -> TrainConfig:
    model = ("width=8", "multipliers=[1,2]", "groups=4", "heads=2", "attention_levels=[1]", "time_embedding=16")
    sets = [*(f"model.{one}" for one in model), "model.latent_patch=1", "windows_per_volume=2", "optimiser.steps=2"]
    return load_config("tiny", None, [*sets, "every_epochs=1", *more])[0]


def test_the_power_of_a_channel_is_what_a_unit_of_its_error_does_to_the_image() -> None:
    std = [2.0, 1.0, 1.0, 0.5]
    latents = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(n)) * 0.2 for n in range(2)]
    found = channel_power(linear, latents, [0.0] * 4, std, hu_per_unit=200.0)
    expected = (GAINS * torch.tensor(std) * 200.0) ** 2
    assert found == pytest.approx(expected.tolist(), rel=0.15), "an estimate: four signs a voxel of a linear decoder"
    error = 0.01 * torch.randn(4, 3, 8, 8)
    seen = (linear((latents[0] + error)[None] * torch.tensor(std).reshape(1, 4, 1, 1, 1)) - linear(
        latents[0][None] * torch.tensor(std).reshape(1, 4, 1, 1, 1)
    )) * 200.0  # fmt: skip
    predicted = sum(p * float(e.square().mean()) for p, e in zip(found, error, strict=True))
    assert float(seen.square().mean()) == pytest.approx(predicted, rel=0.25)


def test_what_is_clipped_weighs_nothing() -> None:
    latents = [torch.full((4, 2, 4, 4), 50.0)]
    assert channel_power(linear, latents, [0.0] * 4, [1.0] * 4, hu_per_unit=200.0) == [0.0] * 4


def test_a_probe_that_is_not_finite_is_an_error() -> None:
    def broken(latents: Tensor) -> Tensor:
        return linear(latents) * torch.where(latents[:, :1].mean() > -9, math.nan, 1.0)

    with pytest.raises(NonFiniteError, match="Jacobian at training latent 0"):
        channel_power(broken, [torch.zeros(4, 2, 4, 4)], [0.0] * 4, [1.0] * 4, hu_per_unit=200.0)


@pytest.mark.parametrize("name", ["epsilon", "v", "flow", "bridge"])
def test_the_loss_weighs_channels_by_their_power(name: str) -> None:
    """Only the loss: what is predicted and sampled stays as it was."""
    clean, condition = (torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    mask, noise, t = torch.ones(2, 1, 4, 8, 8), torch.randn_like(clean), torch.full((2,), 0.5)

    def model(x: Tensor, t_B: Tensor) -> Tensor:
        return x[:, :4] * 0.5

    plain, weighted = build_objective(name), build_objective(name, channel_weights=[6.0, 0.0, 0.0, 0.0])
    whole = plain.loss(model, clean, condition, mask, noise_BCDHW=noise, t_B=t)
    first = weighted.loss(model, clean, condition, mask, noise_BCDHW=noise, t_B=t)
    alone = build_objective(name, channel_weights=[0.0, 1.0, 1.0, 1.0]).loss(
        model, clean, condition, mask, noise_BCDHW=noise, t_B=t
    )
    assert torch.allclose(first.per_sample / 4 + alone.per_sample * 3 / 4, whole.per_sample, rtol=1e-5)
    assert torch.equal(first.predicted_clean, whole.predicted_clean)
    assert build_objective(name, **weighted.settings()).channel_weights == [6.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -1.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_weights_that_weigh_nothing_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="channel_weights"):
        build_objective("bridge", channel_weights=weights)


def test_a_run_measures_its_decoder_and_looks_at_the_error_in_hu(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    train(store, tmp_path / "run", small(), decoder=linear)
    card = RunCard.read(tmp_path / "run")
    weights = card.build_objective().channel_weights
    assert weights is not None
    assert sum(weights) == pytest.approx(4, rel=1e-3)
    power = card.extra["hu2_per_unit_by_channel"]
    assert [p / sum(power) * 4 for p in power] == pytest.approx(weights, rel=1e-3)
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if row["kind"] == "validation"]
    assert rows
    assert rows[-1]["best"] == min(row["val_rms_hu"] for row in rows), "not the loss, which has no unit"


@pytest.mark.parametrize(("decoder", "more"), [(None, ()), (linear, ("losses.measure=latent",))])
def test_without_a_decoder_or_on_request_all_channels_weigh_alike(
    tmp_path: Path, decoder: Any, more: tuple[str, ...]
) -> None:
    train(make_store(tmp_path / "store"), tmp_path / "run", small(*more), decoder=decoder)
    assert RunCard.read(tmp_path / "run").build_objective().channel_weights is None


def test_the_image_metric_needs_the_decoder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="measure = image without a VAE decoder"):
        train(make_store(tmp_path / "store"), tmp_path / "run", small("losses.measure=image"))


def test_best_looks_at_decoded_pairs_where_they_can_be_decoded(tmp_path: Path) -> None:
    turns = iter(range(100))

    def images(model: Any, step: int) -> dict[str, float]:
        return {"val_psnr_db": 20.0 - next(turns)}

    train(make_store(tmp_path / "store"), tmp_path / "run", small("steps=6"), decoder=linear, validate=images)
    rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if row["kind"] == "validation"]
    assert len(rows) > 1
    assert {row["best"] for row in rows} == {20.0}, "the first look was the best, whatever the loss says"


def test_a_best_of_another_metric_is_forgotten_on_resume() -> None:
    before = Best(ValidationConfig(metric="val_psnr_db"))
    before.take({"val_psnr_db": 30.0})
    after = Best(ValidationConfig(metric="val_rms_hu"))
    after.load_state_dict(before.state_dict())
    assert after.take({"val_rms_hu": 12.0})
    assert not after.take({"val_rms_hu": 13.0}), "less of an error is better"


def test_the_l2_of_a_decoded_slab_counts_only_what_can_be_seen() -> None:
    losses = ImageLosses(
        linear, [0.0] * 4, [1.0] * 4, ms_ssim_weight=0, perceptual_weight=0, l2_weight=2.0, part=DecodedPart(slab=2)
    )
    clean = torch.zeros(2, 4, 2, 8, 8)
    clean[1] += 50.0  # decoded far beyond the window, where an error is clipped
    predicted = (clean + 0.5).requires_grad_(True)
    found = losses(
        predicted, clean, torch.ones(2, 1, 2, 8, 8), torch.ones(2, dtype=torch.bool),
        [torch.Generator().manual_seed(n) for n in range(2)],
    )  # fmt: skip
    expected = float((0.5 * GAINS.sum()) ** 2)
    assert found.l2.tolist() == pytest.approx([expected, 0.0])
    assert found.per_sample.tolist() == pytest.approx([2 * expected, 0.0])
    found.per_sample.sum().backward()  # type: ignore[no-untyped-call]
    assert predicted.grad is not None
    assert float(predicted.grad[0].abs().min()) > 0
    assert float(predicted.grad[1].abs().max()) == 0
