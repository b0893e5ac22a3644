from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from diffusion.config import load_config
from diffusion.training import what_compilation_lacks
from diffusion.training.train import check_arithmetic
from latentcache import InputError
from pipeline.workflows.doctor import compilation


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without a compiler and Python's headers, as the image was."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})


@pytest.mark.usefixtures("bare")
def test_what_is_missing_is_said_and_a_compiled_run_does_not_begin() -> None:
    assert what_compilation_lacks() == ["C compiler", "Python header files"]
    level, text = compilation()
    assert level == "note"
    assert "no C compiler and no Python header files" in text
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match=r"optimiser\.compile = true without a C compiler.*apt-get install gcc"):
        check_arithmetic(load_config("tiny", None, ["optimiser.compile=true"])[0], cpu)
    check_arithmetic(load_config("tiny")[0], cpu)


def test_a_machine_with_both_is_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert what_compilation_lacks() == []
    assert compilation()[0] == "ok"


def test_float32_training_switches_tf32_off() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        check_arithmetic(load_config("tiny")[0], torch.device("cpu"))
        assert torch.backends.cudnn.allow_tf32, "auto leaves the process as it is"
        check_arithmetic(load_config("tiny", None, ["precision=fp32"])[0], torch.device("cpu"))
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
