from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion.config import load_config
from diffusion.config.load import train_preset
from diffusion.losses import ms_ssim
from diffusion.networks import MODEL_PRESETS, UNetConfig, build_unet
from diffusion.training import World, count_forward, estimate_step, remedies
from diffusion.training.resources import check_resources, count_image_losses, saved_bytes
from latentcache import InputError
from pipeline.vae import decoder_on_shapes, load_vae

SMALL = UNetConfig(16, (1, 2), 1, (1,), 2, 32, 4)


def test_counting_on_shapes_is_what_a_real_forward_pass_keeps() -> None:
    _, _, counted, _ = count_forward(SMALL, 2, (5, 16, 16), bf16=False)
    net = build_unet(SMALL)
    with saved_bytes(net) as kept:
        net(torch.zeros(2, 8, 5, 16, 16), torch.zeros(2))
    assert counted == pytest.approx(sum(kept.values()), rel=0.02)


def test_where_the_kernels_run_a_step_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's GroupNorm, modulation and SiLU keep what goes into each; the kernel what goes into the first."""
    _, flops, plain, _ = count_forward(SMALL, 1, (6, 16, 16), bf16=True)
    _, same_flops, fused, _ = count_forward(SMALL, 1, (6, 16, 16), bf16=True, fused=True)
    assert same_flops == flops
    assert fused < 0.8 * plain
    config = load_config("tiny", None, ["precision=bf16"])[0]
    on_cpu = estimate_step(config, (8, 32, 32), World())
    on_gpu = estimate_step(config, (8, 32, 32), World(device=torch.device("cuda")))
    assert on_gpu.activation_bytes < 0.8 * on_cpu.activation_bytes


def test_recomputation_keeps_a_fraction() -> None:
    _, flops, whole, none = count_forward(SMALL, 1, (6, 16, 16), bf16=False)
    checkpointed = replace(SMALL, activation_checkpointing=True)
    _, same_flops, kept, stage = count_forward(checkpointed, 1, (6, 16, 16), bf16=False)
    assert none == 0
    assert same_flops == flops
    assert kept + stage < 0.7 * whole


def test_medium_costs_what_the_arithmetic_says() -> None:
    parameters, flops, _, _ = count_forward(MODEL_PRESETS["medium"], 1, (75, 64, 64), bf16=True)
    assert parameters == pytest.approx(599e6, rel=0.01)
    assert flops / 1e12 == pytest.approx(27.6, rel=0.15), "facts.md: 27.6 TFLOP forward at 75x64x64"


def test_sharding_divides_the_state() -> None:
    config = load_config("medium", None, ["data.window=16"])[0]
    alone = estimate_step(config, (16, 64, 64), World())
    sharded = estimate_step(
        replace(config, parallel=replace(config.parallel, strategy="fsdp")), (16, 64, 64), World(0, 4)
    )
    assert alone.state_bytes == 4 * sharded.state_bytes
    assert alone.state_bytes == alone.parameters * 20
    assert sharded.peak_bytes < alone.peak_bytes


def test_the_image_losses_of_every_sample_are_counted() -> None:
    """12 GiB for a full-plane slab of 4 through MAISI's decoder under autocast, and VGG19 and MS-SSIM beside it."""
    classic = train_preset("classic")
    assert classic.model.activation_checkpointing, "as the model of the system before this one had it"
    published = decoder_on_shapes(None, bf16=True)
    whole = count_image_losses(classic, (75, 128, 128), published)
    assert 12.0 < whole / 2**30 < 15.5
    assert count_image_losses(classic, (75, 64, 64), published) == pytest.approx(whole / 4, rel=0.1)
    plain = replace(classic, losses=replace(classic.losses, perceptual_weight=0, ms_ssim_weight=0))
    assert count_image_losses(plain, (75, 128, 128), published) == 0


def test_what_is_counted_of_the_image_losses_is_what_a_real_slab_keeps() -> None:
    vae = load_vae("tiny")
    config = load_config("tiny", None, ["ms_ssim_weight=0.1", "losses.slab=2", "losses.crop=null"])[0]
    counted = count_image_losses(config, (8, 24, 24), vae.decode_slab)
    with saved_bytes(vae.network) as kept:
        image = vae.decode_slab(torch.zeros(1, 4, 2, 24, 24, requires_grad=True))[0, 0]
        ms_ssim(image, torch.zeros_like(image), data_range=2.0)
    weights = sum(p.nbytes for p in vae.network.parameters())
    assert sum(kept.values()) <= counted <= sum(kept.values()) + 1.1 * weights


def test_a_step_with_image_losses_peaks_where_the_estimate_says(tmp_path: Path) -> None:
    overrides = ["batch_size=2", "ms_ssim_weight=0.1"]
    config = load_config("tiny", None, overrides)[0]
    without = estimate_step(config, (8, 32, 32), World())
    need = estimate_step(config, (8, 32, 32), World(), load_vae("tiny").decode_slab)
    assert need.image_bytes > 0 == without.image_bytes
    assert need.peak_bytes - without.peak_bytes == pytest.approx(1.15 * need.image_bytes, rel=1e-6)
    more = estimate_step(replace(config, data=replace(config.data, batch_size=4)), (8, 32, 32), World(),
                         load_vae("tiny").decode_slab)  # fmt: skip
    assert more.image_bytes == 2 * need.image_bytes, "the graphs of all samples live until the backward pass"


def test_the_predecessors_job_fits_an_a100_80gb() -> None:
    """Batch 2, accumulation 8, whole volumes of 300 slices of 512 x 512, both image losses."""
    config = load_config("classic", None, ["precision=bf16", "losses.perceptual_weight=0.1", "vgg19_weights=given"])[0]
    need = estimate_step(config, (72, 128, 128), World(), decoder_on_shapes(None, bf16=True))
    assert need.image_bytes > 24 * 2**30
    assert 45 < need.peak_bytes / 2**30 < 70, "an A100-80GB has 79 GiB"


def test_the_exchange_of_gradients_between_ranks_is_counted() -> None:
    config = load_config("tiny", None, ["batch_size=1", "samples_per_step=2"])[0]
    sharded = replace(config, parallel=replace(config.parallel, strategy="fsdp"))
    accumulated = replace(sharded, optimiser=replace(config.optimiser, samples_per_step=4))
    shape = (8, 32, 32)
    alone, ddp = (estimate_step(config, shape, World(0, size)) for size in (1, 2))
    assert (alone.exchange_bytes, ddp.exchange_bytes) == (0, 4 * ddp.parameters), "DDP's buckets"
    assert estimate_step(sharded, shape, World(0, 2)).exchange_bytes == 0
    assert estimate_step(accumulated, shape, World(0, 2)).exchange_bytes == 4 * alone.parameters


def test_too_little_memory_names_amounts_and_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion.training import resources as estimate

    classic = train_preset("classic")
    config = replace(classic, model=replace(classic.model, activation_checkpointing=False))
    need = estimate_step(load_config("tiny")[0], (8, 32, 32), World())
    monkeypatch.setattr(estimate, "memory_present", lambda device: need.peak_bytes - 1)
    with pytest.raises(InputError, match=r"GiB are free on cpu.*data\.batch_size=1.*activation_checkpointing=true"):
        check_resources(need, config, torch.device("cpu"), tmp_path)
    assert not any("batch_size" in hint for hint in remedies(replace(config, data=replace(config.data, batch_size=1))))


def test_another_process_on_the_gpu_is_named_where_a_step_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = estimate_step(load_config("tiny")[0], (8, 32, 32), World())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    with pytest.raises(InputError, match=r"GiB are free on cuda; other processes hold about 80\.0 of its 80\.0 GiB"):
        check_resources(need, load_config("tiny")[0], torch.device("cuda"), tmp_path)


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    need = estimate_step(load_config("tiny")[0], (8, 32, 32), World())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=need.checkpoint_bytes))
    with pytest.raises(InputError, match="free for the run directory"):
        check_resources(need, load_config("tiny")[0], torch.device("cpu"), tmp_path / "not" / "there" / "yet")


def test_the_estimate_is_json_ready() -> None:
    json.dumps(vars(estimate_step(load_config("tiny")[0], (8, 32, 32), World())))
