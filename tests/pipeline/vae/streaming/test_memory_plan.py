"""The memory plan of a GPU, made on shapes alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from latentcache import InputError, host_memory
from pipeline.vae import Vae, VaeArchitecture, load_vae
from pipeline.vae.streaming import Plan, free_bytes, make_plan, share_gib
from pipeline.vae.streaming.memory_plan import GIB


def plan(device_gib: float, host_gib: float | None) -> Plan:
    """MAISI's encoder on a chest of 300 x 512 x 512, on a GPU with so much memory free."""
    host = None if host_gib is None else int(host_gib * GIB)
    return make_plan(
        VaeArchitecture(), "encoder", (300, 512, 512, 1), torch.bfloat16, torch.device("cuda"),
        slab_bytes=256 << 20, budget_bytes=int(device_gib * GIB), host_budget_bytes=host,
    )  # fmt: skip


def test_pinned_host_memory_is_held_against_what_the_host_has() -> None:
    roomy = plan(6, None)
    assert roomy.offload
    needed = roomy.host_bytes / GIB
    assert 15 < needed < 30
    assert plan(6, needed + 1) == roomy
    with pytest.raises(InputError, match=r"encoder needs .* GiB of pinned host memory .* with 8\.00 GiB free"):
        plan(6, 8)


def test_a_gpu_too_small_is_refused_and_who_else_holds_its_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"encoder needs .* GiB for 300x512x512, with 0\.20 GiB free; expected"):
        plan(0.2, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 28, 24 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    with pytest.raises(InputError, match=r"with 0\.20 GiB free; other processes hold about 23\.8 of its 24\.0 GiB"):
        plan(0.2, None)


def test_a_volume_that_the_device_holds_needs_no_host_memory() -> None:
    assert plan(40, 0.5).host_bytes == 0


def test_a_cpu_stays_within_its_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(str(2 * GIB))
    (tmp_path / "memory.current").write_text(str(GIB))
    monkeypatch.setattr(host_memory.free_host_bytes, "__defaults__", (tmp_path,))
    assert psutil.virtual_memory().available > 2 * GIB
    assert free_bytes(torch.device("cpu"), None) == int(0.9 * GIB)


def test_a_float32_vae_switches_tf32_off() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        load_vae("tiny", dtype=torch.bfloat16)
        assert torch.backends.cudnn.allow_tf32
        load_vae("tiny")
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.cuda
def test_offloaded_and_resident_give_the_same_latents_and_a_cpu_nearly_so(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = torch.linspace(-1, 1, 24 * 64 * 64).sin().reshape(24, 64, 64)
    vae = load_vae("tiny", "cuda", dtype=torch.float32)
    resident = vae.encode(volume)
    slab = vae.plan_encode((24, 64, 64)).slab_bytes
    monkeypatch.setattr(Vae, "_plan", lambda *_: Plan(slab, True, 0, 0))
    assert torch.equal(vae.encode(volume), resident)
    on_cpu = load_vae("tiny").encode(volume)
    assert float((resident - on_cpu).norm() / on_cpu.norm()) < 1e-3


def test_workers_that_share_a_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
    assert share_gib(torch.device("cuda", 0), 0.5) == pytest.approx(36)
    assert share_gib(torch.device("cuda", 0), 1.0) is None
    assert share_gib(torch.device("cpu"), 0.5) is None


def test_neither_a_plan_nor_a_described_network_loads_the_compiler() -> None:
    """PyTorch imports it, seconds of a worker's start, for what it computes on the meta device in Python."""
    code = """
import sys, torch
from diffusion.networks import UNetConfig, parameter_count
from pipeline.vae import VaeArchitecture
from pipeline.vae.streaming import make_plan
for part, shape in (("encoder", (44, 32, 32, 1)), ("decoder", (11, 8, 8, 4))):
    for device in ("cpu", "cuda"):
        limits = {"slab_bytes": 1 << 20, "budget_bytes": 1 << 34}
        make_plan(VaeArchitecture(), part, shape, torch.float32, torch.device(device), **limits)
parameter_count(UNetConfig(told=True))
print(sorted(name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
