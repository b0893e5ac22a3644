"""The VAE that ships: MONAI's own architecture, small, better than interpolation on phantoms it never saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from pipeline.phantom import PhantomPatient, make_patient
from pipeline.vae import load_vae
from pipeline.volume import Window, resample_z


@pytest.fixture(scope="module")
def weights(repo_root: Path) -> Path:
    return repo_root / "pipeline" / "vae" / "tiny_vae.safetensors"


@pytest.fixture(scope="module")
def patient() -> PhantomPatient:
    return make_patient(777, 96, 24, "APE")


def _monai(weights: Path) -> nn.Module:
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    with safe_open(weights, "pt") as file:
        settings = json.loads(file.metadata()["architecture"])
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    model = AutoencoderKL(**{key: value for key, value in settings.items() if key != "class"})
    model.load_state_dict(state, strict=True)
    return model.eval()


def _psnr(found: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((found - truth) ** 2) / 4))


def test_it_is_small_and_says_what_it_is(weights: Path) -> None:
    assert weights.stat().st_size < 5_000_000
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["recipe"])
    assert recipe["script"] == "infra/train_tiny_vae.py"
    assert recipe["steps"] > 0
    assert json.loads(metadata["architecture"])["latent_channels"] == 4


def test_monais_class_takes_every_tensor_and_gives_our_latents(weights: Path, patient: PhantomPatient) -> None:
    unit = Window().to_unit(patient.thin.hu[:16])
    with torch.no_grad():
        theirs, _ = _monai(weights).encode(torch.from_numpy((unit + 1) / 2)[None, None])
    ours = load_vae("tiny").encode(unit)
    assert float((ours - theirs[0]).abs().max()) < 1e-3 * float(theirs.abs().max())


def test_its_round_trip_beats_interpolation_on_a_phantom_it_never_saw() -> None:
    patient = make_patient(777, 160, 40, "APE")
    window, vae = Window(), load_vae("tiny")
    thin_z, thick_z = np.asarray(patient.thin.geometry.z_mm), np.asarray(patient.thick.geometry.z_mm)
    inside = (thin_z >= thick_z[0]) & (thin_z <= thick_z[-1])
    unit = window.to_unit(patient.thin.hu)
    decoded = np.clip(vae.decode(vae.encode(unit), unit.shape).numpy(), -1, 1)
    cubic = window.to_unit(resample_z(patient.thick.hu, thick_z, thin_z[inside], "cubic"))
    assert _psnr(decoded[inside], unit[inside]) > _psnr(cubic, unit[inside]) + 1


@pytest.mark.parametrize("name", ["maisi", "lung"])
def test_other_windows_survive_the_round_trip(patient: PhantomPatient, name: str) -> None:
    vae = load_vae("tiny")
    unit = Window.parse(name).to_unit(patient.thin.hu[:24])
    decoded = np.clip(vae.decode(vae.encode(unit), unit.shape).numpy(), -1, 1)
    assert _psnr(decoded, unit) > 22


def test_training_starts_at_a_linear_autoencoder(
    repo_root: Path, monkeypatch: pytest.MonkeyPatch, patient: PhantomPatient
) -> None:
    monkeypatch.syspath_prepend(str(repo_root / "infra"))
    start = __import__("tiny_vae_start")
    unit = (Window().to_unit(patient.thin.hu[:16]) + 1) / 2
    torch.manual_seed(0)
    model = start.build()
    with torch.no_grad():
        start.start_linear(model, [unit])
        latent, sigma = model.encode(torch.from_numpy(unit)[None, None])
        back = model.decode(latent)[0, 0].numpy()
    assert float(sigma.max()) == pytest.approx(start.LATENT_SIGMA, rel=1e-3)
    mean, basis, spread = start.principal_blocks([unit])
    blocks = unit.reshape(4, 4, 24, 4, 24, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 64) - mean
    expected = (torch.from_numpy(blocks) @ basis.T / spread).T.numpy()
    for found, component in zip(latent[0].flatten(1).numpy(), expected, strict=True):
        assert np.corrcoef(found, component)[0, 1] > 0.95
    assert -10 * np.log10(np.mean((back - unit) ** 2)) > 14
    del sys.modules["tiny_vae_start"]
