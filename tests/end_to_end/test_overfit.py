"""The whole chain learns one phantom by heart: thick to latents, U-Net, latents to HU, against the VAE's ceiling."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.networks import build_unet, model_preset
from diffusion.objectives import build_objective
from diffusion.sampling import Interpolator
from pipeline.phantom import make_patient
from pipeline.vae import load_vae
from pipeline.volume import Window, resample_z

STEPS, LEARNING_RATE = 200, 2e-3


def psnr(predicted: torch.Tensor, wanted: np.ndarray) -> float:
    error = float(np.square(predicted.clamp(-1, 1).numpy() - wanted).mean())
    return 10 * math.log10(4 / error)


@pytest.mark.slow
def test_a_tiny_model_overfits_one_pair_to_within_half_a_decibel_of_the_vae_ceiling() -> None:
    vae, window = load_vae("tiny"), Window()
    patient = make_patient(3, 64, 40)
    z_thick, z_thin = np.asarray(patient.thick.geometry.z_mm), np.asarray(patient.thin.geometry.z_mm)[4:36]
    thin = window.to_unit(patient.thin.hu[4:36])
    # Nearest-neighbour on purpose: a condition worse than linear leaves more to learn than the VAE takes away.
    condition = vae.encode(window.to_unit(resample_z(patient.thick.hu, z_thick, z_thin, "nearest")))
    target = vae.encode(thin)
    mean, std = target.flatten(1).mean(1), target.flatten(1).std(1)
    clean, given = (((x - mean.reshape(-1, 1, 1, 1)) / std.reshape(-1, 1, 1, 1))[None] for x in (target, condition))
    objective = build_objective("bridge", residual_std=float((clean - given).square().mean().sqrt()), anchor=1.0)
    torch.manual_seed(0)
    model = build_unet(replace(model_preset("tiny"), told=False))  # one pair has one protocol
    optimiser = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for step in range(STEPS):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 - step / STEPS)
        generator = torch.Generator().manual_seed(step)
        optimiser.zero_grad()
        objective.loss(model, clean, given, torch.ones_like(clean[:, :1]), [generator]).per_sample.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    interpolator = Interpolator.from_parts(model, objective, mean.tolist(), std.tolist())
    found = torch.from_numpy(interpolator.generate_latent(condition))
    ceiling, start, reached = (psnr(vae.decode(x, thin.shape), thin) for x in (target, condition, found))
    assert ceiling - reached < 0.5
    latent_gain = 10 * math.log10(float((condition - target).square().sum() / (found - target).square().sum()))
    assert latent_gain > 10, f"latents: {latent_gain:.1f} dB closer; HU: {start:.2f}, {reached:.2f}, {ceiling:.2f} dB"
