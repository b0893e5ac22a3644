"""Sampling a store's pairs into a generated store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.data import align_depth
from diffusion.networks import UNetConfig, build_unet
from diffusion.objectives import build_objective
from diffusion.sampling import (
    Interpolator,
    SampleSettings,
    draw,
    generation_key,
    open_generated,
    plan_samples,
    prepare,
    set_up,
)
from diffusion.sampling.stage import condition_of, generate_store
from latentcache import InputError, LatentStore
from tests.support.synthetic_latents import ENCODING, make_store

CONFIG = UNetConfig(
    width=8, multipliers=(1, 2), blocks_per_level=1, attention_levels=(1,), heads=2, time_embedding=16, groups=4
)
SETTINGS = SampleSettings(num_inference_steps=2, seed=3)


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    return make_store(tmp_path / "store", splits=("train", "val"), depths=(8,), side=8)


def model_for(store: LatentStore, alignment: Any = "pixel", sha: str = "a" * 64) -> Interpolator:
    mean, std = store.whitening(ENCODING.encode_key)
    torch.manual_seed(0)
    return Interpolator.from_parts(
        build_unet(CONFIG),
        build_objective("bridge"),
        [float(m) for m in mean],
        [float(s) for s in std],
        encode_key=ENCODING.encode_key,
        encoding=ENCODING,
        alignment=alignment,
        checkpoint_sha256=sha,
    )


def test_every_pair_gets_a_thin_latent_on_the_thin_grid(store: LatentStore) -> None:
    model = model_for(store)
    seen: list[tuple[int, int]] = []
    summary = generate_store(store, model, None, None, SETTINGS, lambda done, total, key: seen.append((done, total)))
    assert (summary.generated, summary.already_there) == (2, 0)
    assert seen == [(1, 2), (2, 2)]
    out = store.generated(summary.generation_key)
    for pair in store.pairs():
        record = out.find(pair.pair_key, "thin", encode_key=ENCODING.encode_key)
        thin = store.find(pair.thin_key, "thin")
        assert record is not None
        assert thin is not None
        assert (record.shape, record.z0_mm, record.dz_mm, record.valid_zyx) == (
            thin.shape,
            thin.z0_mm,
            thin.dz_mm,
            thin.valid_zyx,
        )
        condition = store.find(pair.pair_key, "thick_on_thin")
        assert condition is not None
        # An untrained bridge: what was committed is the condition, through whitening and back and float16.
        assert np.allclose(out.read(record), store.read(condition), rtol=2e-3, atol=2e-3)


def test_a_second_run_generates_nothing_and_a_broken_one_goes_on(store: LatentStore) -> None:
    model = model_for(store)
    first = generate_store(store, model, [store.pairs()[0].pair_key], None, SETTINGS)
    assert first.generated == 1
    rest = generate_store(store, model, None, None, SETTINGS)
    assert (rest.generation_key, rest.generated, rest.already_there) == (first.generation_key, 1, 1)
    assert generate_store(store, model, None, None, SETTINGS).generated == 0


def test_latent_alignment_goes_by_position(store: LatentStore) -> None:
    model = model_for(store, "latent")
    pair = store.pairs()[0]
    condition, grid = condition_of(store, model, pair)
    thick, thin = store.find(pair.thick_key, "thick"), store.find(pair.thin_key, "thin")
    assert thick is not None
    assert thin is not None
    z = lambda r: r.z0_mm + r.dz_mm * np.arange(r.shape[1])  # noqa: E731
    wanted = align_depth(torch.from_numpy(store.read(thick).astype(np.float32)), z(thick), z(thin))
    assert grid == thin
    assert np.array_equal(condition, wanted.numpy())
    assert generate_store(store, model, None, None, SETTINGS).generated == 2


def test_the_generation_key_names_all_that_changes_a_latent(store: LatentStore) -> None:
    model = model_for(store)
    keys = {
        generation_key(model, SETTINGS),
        generation_key(model, replace(SETTINGS, seed=4)),
        generation_key(model, replace(SETTINGS, num_inference_steps=3)),
        generation_key(model, replace(SETTINGS, sampler="ddim")),
        generation_key(model, replace(SETTINGS, samples=2)),
        generation_key(model, replace(SETTINGS, depth_window=4)),
        generation_key(model_for(store, sha="b" * 64), SETTINGS),
        generation_key(model_for(store, "latent"), SETTINGS),
    }
    assert len(keys) == 8
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


def test_naming_a_default_does_not_change_the_key(store: LatentStore) -> None:
    model = model_for(store)
    spelled_out = SampleSettings(sampler="euler", num_inference_steps=1)
    assert generation_key(model, SampleSettings()) == generation_key(model, spelled_out)


def test_what_cannot_be_sampled_is_refused(store: LatentStore, tmp_path: Path) -> None:
    model = model_for(store)
    with pytest.raises(InputError, match="no pairs"):
        generate_store(store, model, ["0" * 16], None, SETTINGS)
    model.encode_key = "1" * 16
    with pytest.raises(InputError, match="trained on"):
        generate_store(store, model, None, None, SETTINGS)


def test_a_pair_without_its_condition_is_named(store: LatentStore) -> None:
    model = model_for(store)
    stranger = replace(store.pairs()[0], pair_key="e" * 16)
    with pytest.raises(InputError, match=r"e{16} has no thick_on_thin latent"):
        condition_of(store, model, stranger)


def test_a_worker_with_another_checkpoint_or_store_is_refused(store: LatentStore, tmp_path: Path) -> None:
    model = model_for(store)
    out = open_generated(store, model, SETTINGS)
    facts = {"out_url": out.url, "fingerprint": out.secret_fingerprint, "settings": SETTINGS}
    key = generation_key(model, SETTINGS)
    drawing = set_up("cpu", load=lambda device: model, expected_key=key, **facts)  # type: ignore[arg-type]
    (task, *_), already = plan_samples(store, model, None, out)
    record = draw(drawing, prepare(task, store_url=store.url))
    assert (record.key, record.source_digest, already) == (task.name, key, 0)
    with pytest.raises(InputError, match=r"generation key .*same run's folder"):
        set_up("cpu", load=lambda device: model_for(store, sha="b" * 64), expected_key=key, **facts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="does not see the store"):
        set_up("cpu", load=lambda device: model, expected_key=key, **{**facts, "out_url": str(tmp_path / "no")})  # type: ignore[arg-type]


def test_a_worker_without_cuda_says_so(store: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device"):
        set_up(
            "cuda:0",
            load=lambda device: model_for(store),
            out_url=store.url,
            fingerprint="",
            settings=SETTINGS,
            expected_key="",
        )
