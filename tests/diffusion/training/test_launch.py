from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from diffusion.config import load_config
from diffusion.data import make_store
from diffusion.training import check_gpus, is_worker
from diffusion.training.launch import own_error, torchrun_command
from diffusion.training.loop import TrainSummary
from latentcache import InputError


def test_too_many_gpus_are_refused() -> None:
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES"):
        check_gpus(torch.cuda.device_count() + 1)
    check_gpus(0)


def test_a_worker_knows_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert not is_worker()
    monkeypatch.setenv("RANK", "0")
    assert is_worker()


def test_a_workers_error_is_found_in_what_ray_wraps_it_in() -> None:
    own = InputError("a", expected="b", remedy="c")

    class WrappedError(Exception):
        _base_exc = own

    class FailedError(Exception):
        worker_failures: ClassVar[dict[int, Exception]] = {0: OSError("another rank broke off"), 1: WrappedError()}

    assert own_error(FailedError()) is own
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError("around it") from own
    assert own_error(caught.value) is own
    assert own_error(RuntimeError("not ours")) is None


@pytest.mark.slow
def test_torchrun_starts_the_program_once_a_process(tmp_path: Path) -> None:
    program = (
        f"import os, pathlib; pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])"
    )
    subprocess.run(torchrun_command(2, [sys.executable, "-c", program]), check=True, timeout=120)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"0": "2", "1": "2"}


SLOW_SAVE = """
import sys, time, torch
from diffusion.runs.checkpoint import CheckpointFolder
from diffusion.config import load_config
from diffusion.training.train import train
from diffusion.training.distributed import leave
from latentcache.store import LatentStore
torch.set_num_threads(1)
store, run, seconds, *overrides = sys.argv[1:]
save = CheckpointFolder.save
def slowly(self, contents, *, best=False):
    time.sleep(float(seconds))
    return save(self, contents, best=best)
CheckpointFolder.save = slowly
train(LatentStore.open(store), run, load_config("tiny", None, overrides)[0])
leave()
"""


@pytest.mark.parametrize(
    ("options", "save_seconds", "kept"),
    [
        pytest.param({"shutdown_timeout_s": 1}, 8, False, id="too-short", marks=pytest.mark.slow),
        pytest.param({"shutdown_timeout_s": 120}, 2, True, id="long-enough"),
        pytest.param({}, 35, True, id="default", marks=pytest.mark.slow),
    ],
)
def test_sigterm_through_torchrun_leaves_time_for_the_checkpoint(
    tmp_path: Path, options: dict[str, int], save_seconds: int, kept: bool
) -> None:
    """torchrun kills its workers 30 s after it has passed SIGTERM on, unless told otherwise."""
    store, run = make_store(tmp_path / "s", side=8), tmp_path / "run"
    settings = ["model.width=8", "model.multipliers=[1,2]", "model.groups=4", "model.heads=2", "window=4",
                "model.attention_levels=[1]", "model.latent_patch=1", "max_seconds=null", "samples_per_step=4",
                "batch_size=1", "every_epochs=0", "readers=0", "checkpoint_every_steps=100000"]  # fmt: skip
    arguments = [sys.executable, "-c", SLOW_SAVE, store.url.removeprefix("file://"), str(run), str(save_seconds)]
    process = subprocess.Popen(
        torchrun_command(2, [*arguments, *settings], **options),
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 240
        while not (run / "log.jsonl").exists() or (run / "log.jsonl").read_text().count('"train"') < 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    state = run / "checkpoints" / "last" / "state.json"
    assert state.exists() == kept
    if kept:
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert json.loads(state.read_text())["step"] == max(x["step"] for x in lines if x["kind"] == "train") >= 3
        assert lines[-1]["stopped_by"] == "signal"


def test_torchruns_patience_is_the_configurations(caplog: pytest.LogCaptureFixture) -> None:
    assert load_config("medium")[0].parallel.shutdown_timeout_s == 300
    assert "--shutdown-timeout=300" in torchrun_command(2, ["x"])
    assert "--shutdown-timeout=77" in torchrun_command(2, ["x"], 77)
    assert caplog.text == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_train_gives_the_losses_of_one_process_and_a_workers_error_as_it_was(tmp_path: Path) -> None:
    import ray

    from diffusion.runs import read_log
    from diffusion.training import train, train_on_ray
    from pipeline.workflows.training.train import run_training

    overrides = ["model.width=8", "model.groups=4", "model.heads=2", "window=4", "max_steps=4", "max_seconds=null",
                 "samples_per_step=4", "batch_size=2", "every_epochs=0", "readers=0"]  # fmt: skip
    store = make_store(tmp_path / "s", side=8)
    alone: TrainSummary = train(store, tmp_path / "one", load_config("tiny", None, overrides)[0])
    settings = {
        "store": str(tmp_path / "s"), "run": str(tmp_path / "two"), "preset": "tiny", "config": None, "resume": False,
        "overrides": overrides, "vae": None, "private": None, "gpus": 0, "progress": False,
    }  # fmt: skip
    try:
        figures = train_on_ray(run_training, settings, 2, use_gpu=False)
        with pytest.raises(InputError, match="--resume"):
            train_on_ray(run_training, settings, 2, use_gpu=False)
    finally:
        ray.shutdown()
    assert (figures["steps"], figures["stopped_by"]) == (4, "max-steps")
    one, two = (
        [x["loss"] for x in read_log(tmp_path / name / "log.jsonl") if x["kind"] == "train"] for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-5)
    assert alone.steps == 4
