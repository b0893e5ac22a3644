"""`train-vae` in the common loop: it learns, keeps the best, resumes to the bit, obeys SIGTERM and stops at NaN."""

from __future__ import annotations

import importlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from diffusion.runs import LOG, CheckpointFolder, read_log
from diffusion.training import Progress
from latentcache import InputError, NonFiniteError
from pipeline.vae import VaeArchitecture, VaeTrainConfig, load_vae, load_weights
from pipeline.workflows import VaeTrainingJob, run_vae_training

module = importlib.import_module("pipeline.workflows.training.vae")

SMALL = VaeTrainConfig(
    part="all",
    steps=30,
    learning_rate=3e-3,
    warmup=3,
    crop_zyx=(4, 16, 16),
    validate_every=10,
    validation_crops=4,
    architecture=VaeArchitecture(channels=(4, 4, 8), num_res_blocks=(1, 1, 1), norm_num_groups=4),
)


def ramp(number: int, first: int = 0) -> tuple[str, np.ndarray]:
    rng = np.random.default_rng(first + number)
    axis = np.linspace(-1, 1, 24, dtype=np.float32)
    tilted = axis[None, :, None] * rng.uniform(0.3, 1) + axis * rng.uniform(-1, 1) + np.zeros((8, 1, 1))
    return f"ramp {number}", np.clip(tilted, -1, 1)


@pytest.fixture(autouse=True)
def ramps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small volumes in place of the phantoms, which take a second each."""
    made = module.Volumes(ramp, lambda number: ramp(number, 1000), "ramps")
    monkeypatch.setattr(module, "phantoms", lambda window, seed: made)


def test_the_whole_vae_learns_and_the_best_is_written(tmp_path: Path) -> None:
    job = VaeTrainingJob(tmp_path / "vae.safetensors", SMALL)
    done = run_vae_training(job)
    assert (done.summary.stopped_by, done.summary.steps) == ("finished", 30)
    looks = [row for row in read_log(job.run / LOG) if row["kind"] == "validation"]
    assert [row["step"] for row in looks] == [10, 20, 30]
    assert looks[-1]["val_psnr_db"] > looks[0]["val_psnr_db"] + 0.5
    best = max(looks, key=lambda row: row["val_psnr_db"])
    contents = CheckpointFolder(job.run).load("best")
    assert contents.state["step"] == best["step"]
    vae = load_vae(job.out)
    assert done.weights is not None
    assert vae.file_sha256 == done.weights.file_sha256
    written = load_weights(job.out).state
    assert all(torch.equal(written[k.removeprefix("network.")], v) for k, v in contents.average.items())
    latent = vae.encode(ramp(0)[1].astype(np.float32), pad_multiple_zyx=(4, 4, 4))
    assert vae.decode(latent, (8, 24, 24)).isfinite().all()


def interrupted_at(step: int) -> Any:
    def stop(now: Progress) -> None:
        if now.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def test_sigterm_saves_and_resume_ends_at_the_same_bytes(tmp_path: Path) -> None:
    config = replace(SMALL, steps=14, discriminator_weight=0.1, discriminator_after=0.2)
    whole = run_vae_training(VaeTrainingJob(tmp_path / "whole.safetensors", config))
    job = VaeTrainingJob(tmp_path / "halves.safetensors", config)
    first = run_vae_training(job, interrupted_at(10))
    assert first.summary.stopped_by == "signal"
    assert first.weights is None
    assert not job.out.exists()
    with pytest.raises(InputError, match="--resume"):
        run_vae_training(job)
    second = run_vae_training(replace(job, resume=True))
    assert (second.summary.stopped_by, second.summary.steps) == ("finished", 14)
    assert whole.weights is not None
    assert second.weights is not None
    # Not the files' own hashes: the library writes a header's metadata in no fixed order.
    ends, wanted = load_file(job.out), load_file(tmp_path / "whole.safetensors")
    assert ends.keys() == wanted.keys()
    assert all(torch.equal(ends[name], tensor) for name, tensor in wanted.items())
    with pytest.raises(InputError, match="config is"):
        run_vae_training(replace(job, resume=True, config=replace(config, learning_rate=1e-3)))


def test_the_decoder_alone_leaves_latents_and_their_name_as_they_are(tmp_path: Path) -> None:
    first = run_vae_training(VaeTrainingJob(tmp_path / "first.safetensors", replace(SMALL, steps=2))).weights
    config = replace(SMALL, part="decoder", steps=4)
    job = VaeTrainingJob(tmp_path / "second.safetensors", config, vae=tmp_path / "first.safetensors")
    second = run_vae_training(job).weights
    again = run_vae_training(replace(job, out=tmp_path / "third.safetensors", vae=job.out)).weights
    assert first is not None
    assert second is not None
    assert again is not None
    changed = {name for name in first.state if not torch.equal(first.state[name], second.state[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert first.sha256 == second.sha256 == again.sha256, "tuned twice, it still is the encoder of the first file"
    assert len({w.file_sha256 for w in (first, second, again)}) == 3


def test_a_value_that_is_not_finite_stops_the_run_and_names_the_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(number: int) -> tuple[str, np.ndarray]:
        name, volume = ramp(number)
        return name, volume * np.nan if number else volume

    monkeypatch.setattr(module, "phantoms", lambda window, seed: module.Volumes(spoiled, ramp, "spoiled"))
    job = VaeTrainingJob(tmp_path / "x.safetensors", replace(SMALL, steps=60))
    with pytest.raises(NonFiniteError, match=r"step \d+: .* of study ramp \d+ is NaN"):
        run_vae_training(job)
    assert CheckpointFolder(job.run).load("last").state["step"] == 20
    assert not job.out.exists()


def test_a_gradient_that_is_not_finite_is_never_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old loop left such a step out without a word."""
    losses = module.crop_loss

    def steep(network: Any, batch: dict[str, Any], step: int, **options: Any) -> Any:
        terms = losses(network, batch, step, **options)
        if step != 5:
            return terms
        weight = network.network.post_quant_conv.bias
        return replace(terms, per_sample=terms.per_sample + (weight.sum() * 0).sqrt())

    monkeypatch.setattr(module, "crop_loss", steep)
    with pytest.raises(NonFiniteError, match="step 5: the gradient of"):
        run_vae_training(VaeTrainingJob(tmp_path / "x.safetensors", SMALL))


def test_refusals(tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="perceptual"):
        run_vae_training(VaeTrainingJob(out, replace(SMALL, perceptual_weight=1.0)))
    with pytest.raises(InputError, match="no weights"):
        run_vae_training(VaeTrainingJob(out, replace(SMALL, part="decoder")))
    assert not list(tmp_path.iterdir())


def test_the_command_trains_the_tiny_preset_and_says_where_it_is(tmp_path: Path) -> None:
    from cli.main import app

    out = tmp_path / "tiny.safetensors"
    arguments: list[Any] = ["train-vae", out, "--steps", 1, "--crop", "4,16,16", "--json"]
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["architecture"]["upsampling"] == "trilinear"
    assert (result["out"], result["run"]) == (str(out), str(tmp_path / "tiny.run"))
    assert load_weights(out).architecture.channels == (16, 32, 64)


def test_the_arithmetic_is_chosen_and_bf16_refused_on_a_cpu(tmp_path: Path) -> None:
    """Where weight gradients of 3-D convolutions are not computed in it: infra/decisions/0011-bf16-on-cpu.md."""
    job = VaeTrainingJob(tmp_path / "x.safetensors", replace(SMALL, precision="bf16"))
    with pytest.raises(InputError, match=r"--dtype bf16 on a CPU"):
        run_vae_training(job)
    with pytest.raises(InputError, match=r"--dtype half; expected auto, fp32, bf16"):
        run_vae_training(replace(job, config=replace(SMALL, precision="half")))
