from __future__ import annotations

import importlib
import shutil
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.config import load_config
from diffusion.networks import UNetConfig, build_unet
from diffusion.training import LoopConfig, Terms, Trainer, compile_blocks, what_compilation_lacks
from diffusion.training.train import check_arithmetic
from latentcache import InputError
from pipeline.workflows.doctor import compilation

loop = importlib.import_module("diffusion.training.loop")


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
    with pytest.raises(InputError, match=r"optimiser\.compile without a C compiler.*apt-get install gcc"):
        check_arithmetic(load_config("tiny", None, ["optimiser.compile=true"])[0], cpu)
    check_arithmetic(load_config("tiny")[0], cpu)


@pytest.mark.parametrize("wanted", ["false", "true", "blocks", "whole"])
def test_the_trainer_compiles_as_the_setting_says(wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_unet(UNetConfig(8, (1,), 1, (0,), 2, 16, 4))
    settings = load_config("tiny", None, [f"optimiser.compile={wanted}"])[0].optimiser
    monkeypatch.setattr(loop, "COMPILER", "eager")
    stream: Any = [None]
    Trainer(net, lambda *_: Terms(torch.zeros(1)), stream, LoopConfig(settings), tmp_path)
    found = {type(m).__name__ for m in net.modules() if m._compiled_call_impl is not None}
    blocks = {"ResidualBlock", "DepthAttention"}
    assert found == {"false": set(), "true": blocks, "blocks": blocks, "whole": {"UNet"}}[wanted]


def whole_graph(seen: list[int], module: Any, inputs: Any) -> Any:
    """A backend that runs what was traced as it is, and counts the graphs."""
    seen[0] += 1
    return module


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which Dynamo reads of every input
def test_compiled_blocks_give_the_gradients_of_plain_ones() -> None:
    """And every block is one graph: a break in its norm would leave nothing to fuse."""
    found, seen = [], [0]
    for extent in (None, "blocks"):
        torch.manual_seed(0)
        net = build_unet(UNetConfig(8, (1,), 1, (0,), 2, 16, 4))
        torch.nn.init.normal_(net.conv_out.weight, 0, 0.1)
        if extent:
            assert compile_blocks(net, partial(whole_graph, seen)) > 1
        net(torch.randn(1, 8, 3, 4, 4), torch.ones(1)).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert seen == [3], "two widths of residual block and the attention"
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-7)


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
