"""Training as a whole: resume to the bit, ranks, signals, faults. Each fault of the predecessor has a test here."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusion.config import TrainConfig, load_config
from diffusion.data import key_of, make_store
from diffusion.networks import ThickSlices
from diffusion.runs import RunCard, read_log
from diffusion.runs.checkpoint import CheckpointError
from diffusion.sampling import Interpolator
from diffusion.training import train
from latentcache import InputError, LatentStore, NonFiniteError
from latentcache.maintenance import collect, forget_patient, pinned_snapshots
from latentcache.maintenance.pins import unpin
from latentcache.tables import snapshot_numbers
from tests.support.prepared import Script

train_module = importlib.import_module("diffusion.training.train")

SMALL = [
    "model.width=8", "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.heads=2", "model.groups=4",
    "model.time_embedding=16", "model.latent_patch=1", "data.window=4", "data.crop=8", "data.windows_per_volume=3",
    "data.batch_size=2", "data.readers=1", "optimiser.samples_per_step=4", "optimiser.warmup_steps=3",
    "validation.every_epochs=2", "checkpoint_every_steps=3", "budget.max_seconds=null", "optimiser.steps=14",
]  # fmt: skip
"""Three training pairs, three windows each: nine samples an epoch in steps of 4, 4 and a left-over 1."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return make_store(tmp_path_factory.mktemp("store") / "s", side=8)


def small(*overrides: str) -> TrainConfig:
    return load_config("tiny", None, [*SMALL, *overrides])[0]


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / which
    files = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "training")}
    return {f"{name}/{key}": tensor for name, tensors in files.items() for key, tensor in tensors.items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.fixture(scope="module")
def undisturbed(store: LatentStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    summary = train(store, run, small())
    assert summary.stopped_by == "finished"
    return run


def test_the_loss_falls_and_the_run_directory_is_whole(undisturbed: Path, store: LatentStore) -> None:
    log = read_log(undisturbed / "log.jsonl")
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    assert [line["step"] for line in log if line["kind"] == "train"] == list(range(1, 15))
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    card = json.loads((undisturbed / "run.json").read_text())
    assert card["encode_key"] == store.encode_keys()[0]
    assert card["snapshot"] == store.snapshot
    assert 0.1 < card["objective"]["settings"]["residual_std"] < 2, "measured on the training split"
    assert list((undisturbed / "tb").iterdir())
    model = Interpolator.load(undisturbed)
    condition = np.random.default_rng(0).standard_normal((4, 6, 8, 8)).astype(np.float32)
    found = model.generate_latent(condition, thick=ThickSlices(0.0, 4.0, 6, 4.0), z_mm=4.0 * np.arange(6))
    assert np.isfinite(found).all()


def test_validation_really_runs_and_the_best_is_kept(undisturbed: Path) -> None:
    log = read_log(undisturbed / "log.jsonl")
    looks = [line for line in log if line["kind"] == "validation"]
    assert [line["step"] for line in looks] == [6, 12, 14], "every second epoch of three steps, and at the end"
    best = json.loads((undisturbed / "checkpoints" / "best" / "state.json").read_text())
    assert best["best"] == min(line["val_loss"] for line in looks)
    kept = sorted(p.name for p in (undisturbed / "checkpoints").iterdir())
    assert len([name for name in kept if name.startswith("step-")]) <= 2, "only what last and best name"


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_stopped_and_resumed_gives_the_same_bits(
    store: LatentStore, undisturbed: Path, tmp_path: Path, stop: int
) -> None:
    assert train(store, tmp_path / "run", small(f"max_steps={stop}")).stopped_by == "max-steps"
    summary = train(store, tmp_path / "run", small(), resume=True)
    assert (summary.steps, summary.stopped_by) == (14, "finished")
    assert_same_bits(weights(tmp_path / "run"), weights(undisturbed))


TRAIN = """
import sys, torch
from diffusion.config import load_config
from diffusion.training.train import train
from latentcache.store import LatentStore
torch.set_num_threads(1)
store, run, *overrides = sys.argv[1:]
summary = train(LatentStore.open(store), run, load_config("tiny", None, overrides)[0])
print(summary.stopped_by, summary.steps)
"""


def start(store: LatentStore, run: Path, *overrides: str) -> Script:
    return Script(TRAIN, [store.url.removeprefix("file://"), run, *SMALL, *overrides])


def wait_for_step(run: Path, step: int, process: Script) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        lines = read_log(run / "log.jsonl") if (run / "log.jsonl").exists() else []
        if any(line["kind"] == "train" and line["step"] >= step for line in lines):
            return
        assert not ended, process.communicate()
        time.sleep(0.01)
    raise AssertionError("the run made no progress")


def test_killed_at_a_random_step_and_resumed_gives_the_same_bits(
    store: LatentStore, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    step = random.randint(4, 12)
    process = start(store, run)
    wait_for_step(run, step, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train(store, run, small(), resume=True)
    assert_same_bits(weights(run), weights(undisturbed))
    steps = [line["step"] for line in read_log(run / "log.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 15)), "no step twice in the log, none missing"


def test_sigterm_saves_and_ends_in_order(store: LatentStore, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(store, run, "checkpoint_every_steps=1000", "optimiser.steps=100000")
    wait_for_step(run, 4, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    reason, steps = out.split()
    assert reason == "signal"
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert state["step"] == int(steps) >= 4


@pytest.mark.parametrize("stop", [0, 4])
def test_sigterm_between_accumulated_batches_takes_no_half_step_and_loses_nothing(
    store: LatentStore, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """A step of eight batches is half a minute for `medium`: the batches that are left are not waited for."""
    real, calls = train_module.latent_loss, []

    def interrupted(*arguments: Any) -> Any:
        inner = real(*arguments)

        def loss(model: nn.Module, batch: dict[str, Any], step: int) -> Any:
            calls.append(step)
            if step == stop and model.training:
                os.kill(os.getpid(), signal.SIGTERM)
            return inner(model, batch, step)

        return loss

    monkeypatch.setattr(train_module, "latent_loss", interrupted)
    summary = train(store, tmp_path / "run", small())
    assert (summary.stopped_by, summary.steps) == ("signal", stop)
    assert calls.count(stop) == 1, "the second batch of the step was not computed"
    monkeypatch.setattr(train_module, "latent_loss", real)
    train(store, tmp_path / "run", small(), resume=True)
    assert_same_bits(weights(tmp_path / "run"), weights(undisturbed))


def test_a_job_that_restarts_begins_a_run_and_then_continues_it(
    store: LatentStore, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train(store, run, small("max_steps=4"), resume="if-there").steps == 4
    assert train(store, run, small(), resume="if-there").steps == 14
    assert_same_bits(weights(run), weights(undisturbed))


DISTRIBUTED = """
import sys, torch
from diffusion.config import load_config
from diffusion.training.train import train
from diffusion.training.distributed import leave
from latentcache.store import LatentStore
torch.set_num_threads(1)
store, run, *overrides = sys.argv[1:]
train(LatentStore.open(store), run, load_config("tiny", None, overrides)[0])
leave()
"""


def free_port() -> int:
    """A port that nobody listens on, below the range that outgoing connections are given theirs from."""
    while True:
        port = random.randint(10000, 32000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_give_the_losses_of_one(store: LatentStore, tmp_path: Path, strategy: str) -> None:
    settings = ["optimiser.steps=20", "data.batch_size=1", f"parallel.strategy={strategy}"]
    train(store, tmp_path / "one", small("optimiser.steps=20"))
    url, port = store.url.removeprefix("file://"), str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", DISTRIBUTED, url, str(tmp_path / "two"), *SMALL, *settings],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in ranks:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    one, two = (
        [line for line in read_log(tmp_path / name / "log.jsonl") if line["kind"] in ("train", "validation")]
        for name in ("one", "two")
    )
    assert [x["kind"] for x in one] == [x["kind"] for x in two]
    for a, b in zip(one, two, strict=True):
        figure = "loss" if a["kind"] == "train" else "val_loss"
        assert b[figure] == pytest.approx(a[figure], rel=1e-5), f"{figure} at step {a['step']}"
    for name, tensor in weights(tmp_path / "one").items():
        if name.startswith("model/"):
            assert torch.allclose(tensor, weights(tmp_path / "two")[name], atol=2e-5), name


def test_left_over_samples_weigh_as_much_as_any(store: LatentStore) -> None:
    """Gradients of a step are the mean over its own samples, whatever the micro-batches: 4, 2 + 2, 1 + 1 + 1 + 1."""
    gradients = []
    for batch_size in (4, 2, 1, 3):
        trainer = loop_of(store, small(f"data.batch_size={batch_size}", "optimiser.clip_norm=1e9"))
        steps = iter(trainer.stream)
        for _ in range(3):  # the third step is the epoch's left-over of one sample
            trainer.training_step(next(steps))
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.module.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, rtol=1e-3, atol=1e-5)


def loop_of(store: LatentStore, config: TrainConfig, run: Path | None = None) -> Any:
    """A trainer as ``train`` makes it, not yet running."""
    from diffusion.networks import build_unet
    from diffusion.objectives import build_objective
    from diffusion.training import LoopConfig, Trainer, World

    stream, _ = train_module.open_streams(store, config, World())
    torch.manual_seed(config.seed)
    loss = train_module.latent_loss(build_objective("bridge"), torch.device("cpu"))
    loop = LoopConfig(config.optimiser, config.validation, config.budget, config.parallel)
    return Trainer(build_unet(config.model), loss, stream, loop, run or Path("unused"))


def test_resume_binds_the_optimiser_to_the_new_parameters(
    store: LatentStore, undisturbed: Path, tmp_path: Path
) -> None:
    """The predecessor resumed with an optimiser of the old parameters: the model no longer changed."""
    import shutil

    shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    config = small("optimiser.schedule=constant")
    trainer = loop_of(store, config, tmp_path / "run")
    trainer.total_steps = 14
    trainer.resume()
    owned = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for p in trainer.module.parameters()}
    before = [p.detach().clone() for p in trainer.module.parameters()]
    steps = iter(trainer.stream)
    trainer.training_step(next(steps))
    changed = [not torch.equal(a, b) for a, b in zip(before, trainer.module.parameters(), strict=True)]
    assert np.mean(changed) > 0.95


def test_a_non_finite_loss_stops_the_run_and_names_step_and_study(
    store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_module.latent_loss
    poisoned = key_of(1, 1)

    def with_nan(*arguments: Any) -> Any:
        inner = real(*arguments)

        def loss(model: nn.Module, batch: dict[str, Any], step: int) -> Any:
            terms = inner(model, batch, step)
            if step >= 4:
                bad = torch.tensor([key == poisoned for key in batch["study_key"]])
                terms = replace(terms, per_sample=torch.where(bad, torch.nan, terms.per_sample))
            return terms

        return loss

    monkeypatch.setattr(train_module, "latent_loss", with_nan)
    with pytest.raises(NonFiniteError, match=rf"step [4-6]: loss of study {poisoned}"):
        train(store, tmp_path / "run", small())
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert 3 <= state["step"] <= 6
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run").values() if v.is_floating_point())


def test_a_latent_that_is_not_finite_names_the_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path / "s", splits=("train",), side=8)
    real = store.read

    def with_nan(*arguments: Any, **options: Any) -> Any:
        latent = np.array(real(*arguments, **options))
        latent[0, 0, 0, 0] = np.nan
        return latent

    config = small("validation.every_epochs=0", "objective.settings={residual_std: 0.5}")
    monkeypatch.setattr(store, "read", with_nan)
    with pytest.raises(NonFiniteError, match=rf"thin latent of series {key_of(3, 0)}.*ctpipe verify"):
        train(store, tmp_path / "run", config)


def test_a_non_finite_gradient_names_the_tensor(store: LatentStore) -> None:
    trainer = loop_of(store, small())
    name, parameter = next(iter(trainer.module.named_parameters()))
    parameter.register_hook(lambda g: g * torch.inf)
    before = parameter.detach().clone()
    for other in list(trainer.module.parameters())[1:]:  # zero-initialised layers would pass no gradient on
        nn.init.normal_(other, std=0.05)
    steps = iter(trainer.stream)
    with pytest.raises(NonFiniteError, match=f"the gradient of {name}"):
        trainer.training_step(next(steps))
    assert torch.equal(before, parameter), "no step was taken"


def test_a_checkpoint_of_another_architecture_is_refused(store: LatentStore, undisturbed: Path) -> None:
    trainer = loop_of(store, small("model.width=16"), undisturbed)
    with pytest.raises(CheckpointError, match=r"another architecture.*tensors fit"):
        trainer.resume()


@pytest.mark.parametrize(
    ("override", "name"),
    [("optimiser.learning_rate=1e-2", "optimiser.learning_rate"), ("seed=5", "seed"), ("data.window=3", "data.window")],
)
def test_resuming_with_other_settings_is_refused(
    store: LatentStore, undisturbed: Path, override: str, name: str
) -> None:
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        train(store, undisturbed, small(override), resume=True)


def test_a_run_directory_is_never_trained_over(store: LatentStore, undisturbed: Path) -> None:
    with pytest.raises(InputError, match="--resume"):
        train(store, undisturbed, small())


def test_bfloat16_on_a_cpu_is_refused_before_the_first_step(store: LatentStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"precision = bf16 on a CPU.*precision=auto"):
        train(store, tmp_path / "run", small("optimiser.precision=bf16"))
    assert not (tmp_path / "run").exists()


def test_an_empty_validation_split_is_said_with_the_remedy(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", splits=("train", "train"), side=8)
    with pytest.raises(InputError, match=r"val split.*validation\.every_epochs=0"):
        train(store, tmp_path / "run", small())
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert train(store, tmp_path / "run", small("validation.every_epochs=0", "max_steps=1")).best_metric is None


def test_early_stopping_waits_for_its_patience(store: LatentStore, tmp_path: Path) -> None:
    figures = iter([1.0, 0.5, 0.6, 0.7, 0.8])
    config = small(
        "validation.every_epochs=1", "validation.patience=2", "validation.metric=mae_hu", "validation.mode=min"
    )
    summary = train(store, tmp_path / "run", config, validate=lambda model, step: {"mae_hu": next(figures)})
    assert (summary.stopped_by, summary.steps, summary.best_metric) == ("early-stopping", 12, 0.5)
    best = json.loads((tmp_path / "run" / "checkpoints" / "best" / "state.json").read_text())
    assert best["step"] == 6


def test_a_metric_that_validation_does_not_give_is_an_error(store: LatentStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"validation\.metric = val_psnr_db.*val_loss"):
        train(store, tmp_path / "run", small("validation.metric=val_psnr_db", "validation.every_epochs=1"))


def test_pairs_across_fields_of_view_are_left_out_of_latent_alignment_and_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path / "s", side=8)
    across = replace(store.pairs()[0], evidence=json.dumps({"across_fields": True}))
    store.append_catalog([], [across])
    config = small("data.alignment=latent", "max_steps=1", "validation.every_epochs=0")
    train(LatentStore.open(tmp_path / "s"), tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["extra"]["train_pairs"] == 2
    assert caplog.text.count("2 pairs are used and left out are 1 (another field of view") == 1
    caplog.clear()
    train(LatentStore.open(tmp_path / "s"), tmp_path / "pixel", small("max_steps=1", "validation.every_epochs=0"))
    assert json.loads((tmp_path / "pixel" / "run.json").read_text())["extra"]["train_pairs"] == 3
    assert "left out" not in caplog.text


def test_a_store_that_lost_a_latent_under_the_run_names_the_series(tmp_path: Path) -> None:
    import shutil

    store = make_store(tmp_path / "s", splits=("train", "val"), side=8)
    record = next(r for r in store.records(role="thin") if r.key == key_of(3, 0))
    train(store, tmp_path / "run", small("max_steps=2"))
    shutil.rmtree(tmp_path / "s" / record.path)
    with pytest.raises(InputError, match=record.key):
        train(store, tmp_path / "run", small(), resume=True)


def test_a_store_that_forgot_a_patient_under_the_run_says_so(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", side=8)
    train(store, tmp_path / "run", small("max_steps=2"))
    forget_patient(LatentStore.open(tmp_path / "s"), key_of(2, 0))
    with pytest.raises(InputError, match=rf"without snapshot {store.snapshot}.*forgotten.*new run directory"):
        train(LatentStore.open(tmp_path / "s"), tmp_path / "run", small(), resume=True)


def test_a_disk_that_fills_under_a_run_costs_the_steps_since_the_last_checkpoint(
    store: LatentStore, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion.runs import checkpoint

    run, real = tmp_path / "run", checkpoint.save_file

    def full_from_the_second_on(tensors: Any, path: Path) -> None:
        if (run / "checkpoints" / "last").exists():
            raise OSError(28, "No space left on device", str(path))
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_from_the_second_on)
    with pytest.raises(CheckpointError, match=r"step 6 .*No space left.*--resume"):
        train(store, run, small("validation.every_epochs=0"))
    assert json.loads((run / "checkpoints" / "last" / "state.json").read_text())["step"] == 3
    monkeypatch.undo()
    train(store, run, small("validation.every_epochs=0"), resume=True)
    assert_same_bits(weights(run), weights(undisturbed))


def test_volumes_of_300_and_281_slices_train_side_by_side(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", splits=("train",) * 4, depths=(75, 70), side=8)
    config = small("data.window=null", "windows_per_volume=1", "validation.every_epochs=0", "optimiser.steps=2")
    summary = train(store, tmp_path / "run", config)
    assert (summary.steps, summary.stopped_by) == (2, "finished")
    samples = [x["samples"] for x in read_log(tmp_path / "run" / "log.jsonl") if x["kind"] == "train"]
    assert samples == [2, 2], "a step for each depth bucket (72 and 64), nothing padded, nothing dropped"


def test_resume_reopens_the_snapshot_the_run_is_pinned_to(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", side=8)
    train(store, tmp_path / "run", small("max_steps=4"))
    train(store, tmp_path / "straight", small())
    grown = LatentStore.open(tmp_path / "s")
    grown.append_catalog([], [replace(grown.pairs()[0], pair_key=key_of(8, 0), thick_key=key_of(4, 1))])
    assert grown.snapshot > store.snapshot
    train(LatentStore.open(tmp_path / "s"), tmp_path / "run", small(), resume=True)
    assert_same_bits(weights(tmp_path / "run"), weights(tmp_path / "straight"))


def test_expiring_snapshots_spares_the_one_that_a_run_is_pinned_to(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", side=8)
    config = small("max_steps=2", "validation.every_epochs=0")
    train(store, tmp_path / "run", config)
    (name,) = pinned_snapshots(store.location)[store.snapshot]
    assert name == RunCard.read(tmp_path / "run").pin_name
    train(LatentStore.open(tmp_path / "s"), tmp_path / "other", config)
    assert len(pinned_snapshots(store.location)[store.snapshot]) == 2, "every run has a pin of its own"
    grown = LatentStore.open(tmp_path / "s")
    for number in (1, 2):
        grown.append_catalog([], [replace(grown.pairs()[0], pair_key=key_of(8, number))])
    unpin(store.location, RunCard.read(tmp_path / "other").pin_name)
    collect(LatentStore.open(tmp_path / "s"), grace_s=0.0, expire_snapshots=True)
    kept = snapshot_numbers(store.location)
    fence = grown.snapshot + 1  # gc commits one before it deletes, so that a driver that slept is refused
    assert sorted(kept) == [store.snapshot, grown.snapshot, fence], "the one between is gone, the pinned one is not"
    again = small("max_steps=3", "validation.every_epochs=0")
    assert train(LatentStore.open(tmp_path / "s"), tmp_path / "run", again, resume=True).steps == 3
    assert pinned_snapshots(store.location) == {store.snapshot: [name]}, "a resume pins no second time"


def test_a_store_that_cannot_be_written_is_trained_on_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path / "s", side=8)

    def refuse(path: str, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(store.location, "put", refuse)
    assert train(store, tmp_path / "run", small("max_steps=1", "validation.every_epochs=0")).steps == 1
    assert "could not be pinned (Permission denied)" in caplog.text
    assert str(tmp_path) not in caplog.text


def test_another_store_is_refused_on_resume(store: LatentStore, undisturbed: Path, tmp_path: Path) -> None:
    other = LatentStore.create(tmp_path / "other", secret_fingerprint="a" * 16)
    with pytest.raises(InputError, match="fingerprint"):
        train(other, undisturbed, small(), resume=True)


def test_image_losses_without_a_decoder_are_never_skipped_in_silence(store: LatentStore, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without a VAE decoder"):
        train(store, tmp_path / "run", small("losses.ms_ssim_weight=0.1"))


def test_image_losses_come_every_so_many_steps(store: LatentStore, tmp_path: Path) -> None:
    calls: list[int] = []

    def decoder(latents: torch.Tensor) -> torch.Tensor:
        calls.append(latents.shape[2])
        up = torch.nn.functional.interpolate(latents, scale_factor=(4.0, 4.0, 4.0))
        return torch.tanh(up.mean(1, keepdim=True))

    config = small("losses.ms_ssim_weight=0.1", "losses.every=2", "losses.slab=2", "max_steps=4",
                   "validation.every_epochs=0")  # fmt: skip
    train(store, tmp_path / "run", config, decoder=decoder)
    parts = {x["step"]: x.get("ms_ssim") for x in read_log(tmp_path / "run" / "log.jsonl") if x["kind"] == "train"}
    assert [step for step, value in parts.items() if value is not None] == [1, 3]
    assert all(value > 0 for value in parts.values() if value is not None)
    assert set(calls) == {2}


def test_a_time_budget_ends_the_session_and_changes_no_step(
    store: LatentStore, undisturbed: Path, tmp_path: Path
) -> None:
    summary = train(store, tmp_path / "run", small("max_seconds=0.01"))
    assert summary.stopped_by == "max-seconds"
    assert summary.steps >= 1
    train(store, tmp_path / "run", small(), resume=True)
    assert_same_bits(weights(tmp_path / "run"), weights(undisturbed))


def test_processor_time_is_a_budget_too(store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("diffusion.training.loop.time.process_time", lambda: float(next(clock)))
    summary = train(store, tmp_path / "run", small("max_cpu_seconds=3"))
    assert summary.stopped_by == "max-seconds"
    assert summary.steps == 3, "one look at the clock a step, and the step at hand is finished"


def test_too_little_memory_is_said_before_the_first_step(
    store: LatentStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion.training import resources as estimate

    monkeypatch.setattr(estimate, "memory_present", lambda device: 1 << 20)
    with pytest.raises(InputError, match=r"activation_checkpointing=true"):
        train(store, tmp_path / "run", small())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_every_test_that_the_decision_page_names_exists(repo_root: Path) -> None:
    page = (repo_root / "infra" / "docs" / "results.md").read_text()
    named, module = [], ""
    for found, name in re.findall(r"`(test_\w+)?::(test_\w+)`", page):
        module = found or module
        named.append((module, name))
    assert len(named) > 25
    missing = [
        f"{module}::{name}"
        for module, name in named
        if not any(f"\ndef {name}(" in file.read_text() for file in (repo_root / "tests").rglob(f"{module}.py"))
    ]
    assert missing == []
