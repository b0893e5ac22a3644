"""What doctor says of an epoch's length follows from the length, not from the machine that runs the test."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusion.config import BudgetConfig, load_config
from latentcache import InputError, numerics
from pipeline.workflows import doctor

MEDIUM, _ = load_config("medium")


@pytest.mark.parametrize(
    ("hours", "level", "said"),
    [
        (0.1, "ok", ""),
        (5.9, "ok", ""),
        (6.1, "note", "100 epochs would take 25 days"),
        (47, "note", "100 epochs would take 196 days"),
        (49, "problem", "100 epochs would take 204 days"),
        (4746, "problem", "100 epochs would take 54 years"),
    ],
)
def test_an_absurd_epoch_is_not_called_ok(hours: float, level: str, said: str) -> None:
    found, text = doctor.judge_epoch(3600 * hours, MEDIUM)
    assert found == level
    assert said in text
    assert ("--gpus" in text) == (level != "ok"), "the remedy stands beside the finding"


def test_a_run_with_a_limit_is_not_promised_all_its_epochs() -> None:
    limited = replace(MEDIUM, budget=BudgetConfig(max_seconds=60.0))
    level, text = doctor.judge_epoch(3600.0 * 60, limited)
    assert level == "problem"
    assert "epochs would take" not in text


def test_the_epoch_of_a_hopeless_machine_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """`medium` on a device of 1 GFLOP/s: 4,746 hours were called `ok` once."""
    monkeypatch.setattr("diffusion.training.measured_matmul_rate", lambda device, dtype: 1e9)
    level, text = doctor.epoch_time(MEDIUM, [])
    assert level == "problem"
    assert "years" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(60, "1.0 min"), (7300, "2 h"), (3 * 86400, "3 days"), (4746 * 3600, "198 days"), (1e8, "3 years")],
)
def test_lengths_are_spelled_as_a_person_says_them(seconds: float, text: str) -> None:
    assert doctor.spelled(seconds) == text


def test_a_driver_that_torch_cannot_use_is_a_problem_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", tmp_path / "version")
    assert doctor.driver_without_gpu("13.0") == "", "a machine without a GPU"
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01\nGCC version\n")

    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    level, text = doctor.device()
    assert level == "problem"
    assert "470.82.01" in text
    assert "torch for CUDA 13.0 finds no GPU: The NVIDIA driver on your system is too old" in text
    assert "built without CUDA" in doctor.driver_without_gpu(None)


def test_a_cudnn_of_the_wrong_kind_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1 << 30, 2 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H100")
    monkeypatch.setattr("diffusion.training.measured_matmul_rate", lambda device, dtype: 1e12)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(numerics, "check_large_convolution", lambda device: 0.0)
    with pytest.raises(InputError, match=r"cuDNN 9\.10\.0"):
        doctor.device()
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert doctor.device() == ("ok", "H100 1/2 GiB free, 1 TFLOP/s in bf16")
