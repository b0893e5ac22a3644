"""`ctpipe train`, `selftest` and `doctor` as a user calls them, on made-up latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cli.main import app
from diffusion.config import load_config
from diffusion.data import make_store
from latentcache import InputError, LatentStore
from pipeline.workflows import configuration
from pipeline.workflows.training.train import image_side

FAST = [
    "--set", "model.width=8", "--set", "model.multipliers=[1,2]", "--set", "model.attention_levels=[1]",
    "--set", "model.groups=4", "--set", "model.heads=2", "--set", "model.time_embedding=16", "--set", "window=4",
    "--set", "windows_per_volume=2", "--set", "images_every=0", "--set", "max_seconds=null", "--gpus", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return make_store(tmp_path_factory.mktemp("store") / "s", side=8)


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    threads = torch.get_num_threads()
    code = app([str(w) for w in words], standalone_mode=False)
    torch.set_num_threads(threads)
    return int(code or 0), json.loads(capsys.readouterr().out)


def folder(store: LatentStore) -> str:
    return store.url.removeprefix("file://")


def test_train_then_resume(store: LatentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    code, first = call(capsys, "train", folder(store), run, "--preset", "tiny", *FAST, "--max-steps", "2", "--json")
    assert (code, first["steps"], first["stopped_by"]) == (0, 2, "max-steps")
    code, second = call(capsys, "train", folder(store), run, "--resume", "--gpus", "0", "--max-steps", "3", "--json")
    assert (second["steps"], second["parameters"]) == (3, first["parameters"]), "the run's own configuration was taken"
    assert (run / "checkpoints" / "last" / "model.safetensors").exists()


def test_dry_run_says_what_it_would_do_and_writes_nothing(
    store: LatentStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, plan = call(capsys, "train", folder(store), tmp_path / "run", "--preset", "tiny", "--dry-run", "--json")
    assert code == 0
    assert (plan["training_pairs"], plan["validation_pairs"], plan["samples_per_epoch"]) == (3, 1, 24)
    assert plan["memory_needed_gib"] > 0
    assert plan["parameters"] > 10**6
    assert not (tmp_path / "run").exists()


def test_latent_patch_reaches_the_model(tmp_path: Path) -> None:
    settings = {"run": str(tmp_path), "resume": False, "preset": "medium", "config": None}
    assert configuration(settings | {"overrides": ["model.latent_patch=2"]}).model.latent_patch == 2


def test_the_wrong_vae_is_refused_before_training(store: LatentStore) -> None:
    settings = {"store": folder(store), "private": None, "vae": None}
    config, _ = load_config("tiny", None, ["ms_ssim_weight=0.1"])
    with pytest.raises(InputError, match="--vae PATH"):
        image_side(settings, config, store, "cpu", first=True)
    with pytest.raises(InputError, match="SHA-256 begins"):
        image_side(settings | {"vae": "tiny"}, config, store, "cpu", first=True)
    plain, _ = load_config("tiny", None, ["images_every=0"])
    assert image_side(settings, plain, store, "cpu", first=True) == (None, None)


def test_more_gpus_than_there_are_is_an_error(store: LatentStore, tmp_path: Path) -> None:
    wanted = torch.cuda.device_count() + 2
    with pytest.raises(InputError, match=f"--gpus {wanted}"):
        app(["train", folder(store), str(tmp_path / "run"), "--gpus", str(wanted)], standalone_mode=False)


def test_selftest_on_a_store_passes_its_six_checks(store: LatentStore, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["selftest", "--store", folder(store), "--json"]
    code, report = call(capsys, *words, *(w for w in FAST if w not in ("--gpus", "0")))
    assert [c["name"] for c in report["checks"]] == ["data", "model", "losses", "forward", "training step", "memory"]
    assert report["passed"], report
    assert code == 0


def test_selftest_fails_where_something_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = LatentStore.create(tmp_path / "s", secret_fingerprint="f" * 16)
    code, report = call(capsys, "selftest", "--store", folder(empty), "--json")
    failed = {c["name"] for c in report["checks"] if not c["passed"]}
    assert code == 1
    assert {"data", "losses", "forward"} <= failed
    assert "model" not in failed


def test_doctor_reports_the_store_and_the_memory(store: LatentStore, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = call(capsys, "doctor", folder(store), "--preset", "tiny", "--json")
    found = {f["name"]: f for f in report["findings"]}
    assert code == 0
    assert set(found) == {"machine", "device", "compilation", "disk", "VAE weights", "store", "memory", "epoch"}
    assert "4 pairs" in found["store"]["detail"]
    assert {"out of memory", "NaN or infinity", "disk full"} <= set(report["remedies"])


def test_doctor_names_an_empty_validation_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(tmp_path / "s", splits=("train",), side=8)
    code, report = call(capsys, "doctor", folder(store), "--preset", "tiny", "--json")
    assert code == 1
    assert any("val split is empty" in f["detail"] for f in report["findings"])
