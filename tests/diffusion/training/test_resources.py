from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion.config import load_config
from diffusion.config.load import train_preset
from diffusion.networks import MODEL_PRESETS, UNetConfig, build_unet
from diffusion.training import World, count_forward, estimate_step, remedies
from diffusion.training.resources import check_resources, saved_bytes
from latentcache import InputError

SMALL = UNetConfig(16, (1, 2), 1, (1,), 2, 32, 4)


def test_counting_on_shapes_is_what_a_real_forward_pass_keeps() -> None:
    _, _, counted, _ = count_forward(SMALL, 2, (5, 16, 16), bf16=False)
    net = build_unet(SMALL)
    with saved_bytes(net) as kept:
        net(torch.zeros(2, 8, 5, 16, 16), torch.zeros(2))
    assert counted == pytest.approx(sum(kept.values()), rel=0.02)


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


def test_too_little_memory_names_amounts_and_remedies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusion.training import resources as estimate

    config = train_preset("classic")
    need = estimate_step(load_config("tiny")[0], (8, 32, 32), World())
    monkeypatch.setattr(estimate, "memory_present", lambda device: need.peak_bytes - 1)
    with pytest.raises(InputError, match=r"GiB are free on cpu.*data\.batch_size=1.*activation_checkpointing=true"):
        check_resources(need, config, torch.device("cpu"), tmp_path)
    assert not any("batch_size" in hint for hint in remedies(replace(config, data=replace(config.data, batch_size=1))))


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
