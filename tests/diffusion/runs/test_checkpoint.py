from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusion.config import OptimiserConfig
from diffusion.runs import CheckpointFolder, PowerEma, check_tensors, checkpoint as module, gather, restore
from diffusion.runs.checkpoint import CheckpointError, Contents
from diffusion.training.optimiser import build_adamw


def network(seed: int, width: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(2, width, 3), nn.GroupNorm(2, width), nn.Conv3d(width, 2, 1))


def trained(seed: int = 0, steps: int = 3) -> tuple[nn.Module, torch.optim.AdamW, PowerEma]:
    net = network(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    ema = PowerEma(net, 0.1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        net(torch.randn(2, 2, 4, 4, 4)).square().mean().backward()
        optimizer.step()
        ema.update(step)
    return net, optimizer, ema


def contents(step: int, seed: int = 0) -> Contents:
    return gather(*trained(seed), {"step": step})


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_everything_comes_back_to_the_bit(tmp_path: Path) -> None:
    net, optimizer, ema = trained()
    folder = CheckpointFolder(tmp_path)
    folder.save(gather(net, optimizer, ema, {"step": 3, "stream": {"epoch": 1}}))
    other = network(9)
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-2)
    other_ema = PowerEma(other, 0.1)
    loaded = folder.load()
    restore(loaded, other, other_optimizer, other_ema)
    assert loaded.state["stream"] == {"epoch": 1}
    a, b = gather(net, optimizer, ema, {"step": 3}), gather(other, other_optimizer, other_ema, {"step": 3})
    assert same(a.weights, b.weights)
    assert same(a.average, b.average)
    assert {k: v for k, v in a.training.items() if "exp_avg" in k}.keys()
    assert same(a.training, b.training)
    x = torch.randn(1, 2, 4, 4, 4)
    for n, o in ((net, optimizer), (other, other_optimizer)):
        o.zero_grad()
        n(x).square().mean().backward()
        o.step()
    assert same(dict(net.state_dict()), dict(other.state_dict())), "the next step agrees too"


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_a_resume_is_exact_whatever_the_layout_and_the_kernel(
    tmp_path: Path, fused: bool, layout: torch.memory_format
) -> None:
    """The fused kernel takes strides for granted: moments that come back in another order are other moments."""

    def start(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
        net = network(seed, width=8).to(memory_format=layout)
        return net, torch.optim.AdamW(net.parameters(), lr=1e-3, fused=fused)

    def step(net: nn.Module, optimizer: torch.optim.AdamW, number: int) -> None:
        torch.manual_seed(number)
        optimizer.zero_grad()
        net(torch.randn(2, 2, 4, 4, 4).contiguous(memory_format=layout)).square().mean().backward()
        optimizer.step()

    straight, straight_optimizer = start(0)
    for number in range(6):
        step(straight, straight_optimizer, number)
    first, first_optimizer = start(0)
    for number in range(3):
        step(first, first_optimizer, number)
    folder = CheckpointFolder(tmp_path)
    folder.save(gather(first, first_optimizer, None, {"step": 3}))
    resumed, resumed_optimizer = start(7)
    restore(folder.load(), resumed, resumed_optimizer, None)
    for parameter in resumed.parameters():
        moments = resumed_optimizer.state[parameter]
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == parameter.stride()
    for number in range(3, 6):
        step(resumed, resumed_optimizer, number)
    assert same(dict(resumed.state_dict()), dict(straight.state_dict()))


@pytest.mark.parametrize("fused", [False, True])
def test_the_step_count_comes_back_where_the_optimiser_would_have_made_it(fused: bool) -> None:
    """On the parameter's device for the fused kernel, which refuses any other; on the CPU for the others."""
    parameter = torch.empty(2, 3, device="meta")
    placed = module._like(torch.tensor(3.0), parameter, fused)
    assert placed.device.type == ("meta" if fused else "cpu")


@pytest.mark.cuda
def test_a_run_on_a_gpu_goes_on_after_a_resume(tmp_path: Path) -> None:
    device = torch.device("cuda")

    def start() -> tuple[nn.Module, torch.optim.AdamW]:
        net = network(0, width=8).to(device).to(memory_format=torch.channels_last_3d)
        return net, build_adamw(net, OptimiserConfig(), device)

    def step(net: nn.Module, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        net(torch.ones(2, 2, 4, 4, 4, device=device)).square().mean().backward()
        optimizer.step()

    net, optimizer = start()
    step(net, optimizer)
    folder = CheckpointFolder(tmp_path)
    folder.save(gather(net, optimizer, None, {"step": 1}))
    resumed, resumed_optimizer = start()
    restore(folder.load(), resumed, resumed_optimizer, None)
    for other, its in ((net, optimizer), (resumed, resumed_optimizer)):
        step(other, its)
    for a, b in zip(net.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_last_moves_and_best_stays(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(contents(1), best=True)
    folder.save(contents(2))
    folder.save(contents(3))
    assert folder.load("last").state["step"] == 3
    assert folder.load("best").state["step"] == 1
    assert sorted(p.name for p in folder.root.iterdir()) == ["best", "last", "step-000000001-0", "step-000000003-0"]


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Files of this process cannot grow beyond ``most`` bytes: the kernel refuses the write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most", [0, 100, 3000])
def test_a_disk_that_fills_keeps_the_old_checkpoint(tmp_path: Path, most: int) -> None:
    folder = CheckpointFolder(tmp_path)
    first = contents(1)
    folder.save(first, best=True)
    with full_disk(most), pytest.raises(CheckpointError, match="previous checkpoint is whole") as caught:
        folder.save(contents(2, seed=1), best=True)
    assert str(tmp_path) not in str(caught.value), "no path in the message"
    assert same(folder.load("last").weights, first.weights)
    assert same(folder.load("best").weights, first.weights)
    assert not list(folder.root.glob(".writing-*")), "the half-written one is removed at once"
    folder.save(contents(2, seed=1))
    assert folder.load("last").state["step"] == 2, "once there is room, the next one is written"


STEPS = ["save_file", "sync_file", "_crc32c", "os.rename", "os.replace"]


@pytest.mark.parametrize("place", STEPS)
@pytest.mark.parametrize("call", [0, 1, 2])
def test_a_crash_at_any_step_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, call: int
) -> None:
    class Crash(BaseException):
        pass

    owner: Any = os if place.startswith("os.") else module
    name = place.removeprefix("os.")
    real, seen = getattr(owner, name), []

    def crash(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) > call:
            raise Crash
        return real(*arguments, **options)

    folder = CheckpointFolder(tmp_path)
    folder.save(contents(1), best=True)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        try:
            folder.save(contents(2), best=True)
        except Crash:
            pass
        else:
            assert len(seen) <= call, "a crash was swallowed"
    assert folder.load("last").state["step"] in (1, 2)
    assert folder.load("best").state["step"] in (1, 2)
    folder.save(contents(3), best=True)
    assert folder.load("last").state["step"] == 3
    assert sorted(p.name for p in folder.root.iterdir() if p.name not in ("last", "best")) == ["step-000000003-0"]


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "training.safetensors"])
def test_a_flipped_bit_is_found(tmp_path: Path, file: str) -> None:
    folder = CheckpointFolder(tmp_path)
    path = folder.save(contents(1)) / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=file):
        folder.load()


def test_no_checkpoint_and_a_newer_format(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.path() is None
    with pytest.raises(CheckpointError, match="no last checkpoint"):
        folder.load()
    state = folder.save(contents(1)) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 2}))
    with pytest.raises(CheckpointError, match="format 2"):
        folder.load()


def test_another_architecture_is_told_by_its_tensors() -> None:
    net = network(0)
    with pytest.raises(CheckpointError, match=r"1/6 tensors fit.*of another shape.*0\.weight"):
        check_tensors(net, network(0, width=8).state_dict())
    extra = {**net.state_dict(), "head.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"6/6 tensors fit.*unexpected.*head\.weight"):
        check_tensors(net, extra)
    del extra["head.weight"], extra["0.bias"]
    with pytest.raises(CheckpointError, match=r"5/6 tensors fit.*1 tensors missing \(0\.bias\)"):
        check_tensors(net, extra)
