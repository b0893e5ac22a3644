"""Crops follow from their number, losses train only the part they should, and a tuned file names its encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentcache import InputError
from pipeline.vae import (
    PRESETS,
    CropSource,
    VaeArchitecture,
    VaeInTraining,
    VaeTrainConfig,
    encoder_metadata,
    load_vae,
    load_weights,
    own_decoder,
    reconstruction_losses,
    save_weights,
    tuned_decoder,
)
from pipeline.vae.weights import TINY

SMALL = VaeTrainConfig(
    part="all",
    crop_zyx=(4, 16, 16),
    discriminator_weight=0.1,
    discriminator_after=0.5,
    perceptual_weight=0.1,
    architecture=VaeArchitecture(channels=(4, 4, 8), num_res_blocks=(1, 1, 1), norm_num_groups=4),
)


def ramp(number: int) -> tuple[str, np.ndarray]:
    rng = np.random.default_rng(number)
    axis = np.linspace(-1, 1, 24, dtype=np.float32)
    tilted = axis[None, :, None] * rng.uniform(0.3, 1) + axis * rng.uniform(-1, 1) + np.zeros((2, 1, 1))
    return f"ramp {number}", np.clip(tilted, -1, 1)


def test_a_crop_follows_from_its_number_alone() -> None:
    """Whatever was drawn before: a resumed run sees the crops that the run would have seen."""
    straight = CropSource(ramp, (4, 16, 16), 0, per_volume=2, pool=3)
    seen = [straight.crop(n) for n in range(12)]
    late = CropSource(ramp, (4, 16, 16), 0, per_volume=2, pool=3)
    for number in (9, 3, 11):
        name, crop = late.crop(number)
        assert name == seen[number][0]
        assert torch.equal(crop, seen[number][1])
    assert {name for name, _ in seen[10:]} <= {"ramp 3", "ramp 4", "ramp 5"}
    assert len({name for name, _ in seen}) > 2
    assert all(crop.shape == (1, 4, 16, 16) and 0 <= crop.min() < crop.max() <= 1 for _, crop in seen)
    assert all(torch.equal(crop[0, 1], crop[0, 3]) for _, crop in seen), "edge-padded in depth from two slices"


def test_crops_without_contrast_are_drawn_anew_and_never_for_ever() -> None:
    def half_air(number: int) -> tuple[str, np.ndarray]:
        volume = np.full((4, 16, 64), -1.0, np.float32)
        volume[..., 60:] = np.linspace(-1, 1, 16)[:, None]
        return "half air", volume

    source = CropSource(half_air, (4, 16, 16), 0)
    assert all(float(source.crop(n)[1].std()) > 0.005 for n in range(20))
    with pytest.raises(InputError, match="without contrast"):
        CropSource(lambda n: ("air", np.full((4, 16, 16), -1.0)), (4, 16, 16), 0).crop(0)


def distance(ours: Tensor, theirs: Tensor) -> Tensor:
    assert ours.shape == theirs.shape == (4, 1, 16, 16)
    return (ours.diff(dim=-1) - theirs.diff(dim=-1)).abs().mean()


def gradients(module: VaeInTraining, progress: float, config: VaeTrainConfig) -> tuple[dict[str, Tensor], set[str]]:
    module.zero_grad(set_to_none=True)
    noise = torch.zeros(1, 4, 1, 4, 4)
    crop = CropSource(ramp, (4, 16, 16), 0).crop(0)[1][None]
    terms = reconstruction_losses(module, crop, noise, progress, config, distance)
    terms["loss"].backward()  # type: ignore[no-untyped-call]
    return terms, {name for name, p in module.named_parameters() if p.grad is not None and bool(p.grad.any())}


def test_each_phase_trains_its_part() -> None:
    torch.manual_seed(0)
    module = VaeInTraining(SMALL)
    terms, moved = gradients(module, 0.0, SMALL)
    assert set(terms) == {"l1", "mse", "kl", "perceptual", "loss"}
    assert not any(name.startswith("judge.") for name in moved), "the discriminator waits for its share of the run"
    terms, moved = gradients(module, 0.6, SMALL)
    assert {"adversarial", "judge"} <= set(terms)
    assert any(name.startswith("judge.") for name in moved)
    terms, moved = gradients(module, 0.9, SMALL)
    assert torch.isclose(terms["loss"], 12 * terms["mse"] + SMALL.kl_weight * terms["kl"])
    assert any(name.startswith("network.encoder.") for name in moved)


def test_the_discriminators_own_loss_moves_it_alone() -> None:
    """One backward pass for both: the judge's gradient comes from its hinge loss, not from what it judges."""
    torch.manual_seed(0)
    module = VaeInTraining(SMALL)
    _, _ = gradients(module, 0.6, SMALL)
    assert module.judge is not None
    with_weight = [p.grad.clone() for p in module.judge.parameters() if p.grad is not None]
    gradients(module, 0.6, VaeTrainConfig(**{**vars(SMALL), "discriminator_weight": 50.0}))
    again = [p.grad for p in module.judge.parameters() if p.grad is not None]
    assert len(again) == len(with_weight) > 0
    assert all(torch.equal(a, b) for a, b in zip(with_weight, again, strict=True))


def tuned_from_tiny(out: Path) -> Path:
    """The shipped VAE with another decoder bias: what ``train-vae --preset decoder`` writes."""
    start = load_weights(TINY)
    state = {k: v + 0.01 if k == "post_quant_conv.bias" else v for k, v in start.state.items()}
    save_weights(state, start.architecture, out, encoder_metadata(start))
    return out


def test_a_tuned_decoder_has_its_encoders_name_and_a_hash_of_its_own(tmp_path: Path) -> None:
    tiny, tuned = load_vae("tiny"), load_vae(tuned_from_tiny(tmp_path / "tuned.safetensors"))
    assert tuned.sha256 == tiny.sha256, "the same latents, and so the same encode key"
    assert tuned.file_sha256 != tiny.file_sha256 == tiny.sha256
    assert (own_decoder(tuned), own_decoder(tiny)) == (tuned.file_sha256, "")
    assert tuned_decoder(tmp_path / "tuned.safetensors") == tuned.file_sha256
    assert tuned_decoder("tiny") == tuned_decoder(TINY) == ""
    unit = np.random.default_rng(0).uniform(-1, 1, (4, 32, 32)).astype(np.float32)
    latent = tiny.encode(unit)
    assert torch.equal(tuned.encode(unit), latent)
    assert not torch.equal(tuned.decode(latent, (4, 32, 32)), tiny.decode(latent, (4, 32, 32)))


def test_a_file_that_names_another_encoder_is_refused(tmp_path: Path) -> None:
    tuned = tuned_from_tiny(tmp_path / "tuned.safetensors")
    state = load_file(tuned)
    state["quant_conv_mu.bias"] = state["quant_conv_mu.bias"] + 0.1
    start = load_weights(TINY)
    named: dict[str, Any] = {"architecture": json.dumps(start.architecture.to_dict())}
    save_file(state, tuned, metadata={**named, **encoder_metadata(start)})
    with pytest.raises(InputError, match="not the one its metadata names"):
        load_weights(tuned)


def test_refusals() -> None:
    with pytest.raises(InputError, match="no weights"):
        VaeInTraining(PRESETS["decoder"])
    with pytest.raises(InputError, match="multiples of 4"):
        VaeTrainConfig(crop_zyx=(3, 16, 16))
