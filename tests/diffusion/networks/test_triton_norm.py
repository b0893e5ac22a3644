"""The fused normalisation of the U-Net: equal to PyTorch's operations, forward and backward, and off on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.networks import (
    MODEL_PRESETS,
    DepthAttention,
    UNetConfig,
    assume_fused,
    build_unet,
    fused_norm,
    model_preset,
)
from diffusion.networks.blocks import ModulatedNormSiLU
from diffusion.networks.fused_norm import is_fused, largest_difference, norm_act
from tests.support.triton_on_cpu import DEVICE, compile_for_gpus, needs_gpu

# Lanes beyond the last row hold no data; NumPy, which the interpreter computes with, warns of what comes of them.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def shapes() -> list[tuple[int, int, bool, bool]]:
    """(channels, groups, modulated, SiLU) of every normalisation in every preset."""
    found = set()
    for config in MODEL_PRESETS.values():
        with torch.device("meta"):
            net = build_unet(config)
        for layer in net.modules():
            if isinstance(layer, ModulatedNormSiLU):
                found.add((layer.norm.num_channels, config.groups, layer.modulation is not None, True))
            elif isinstance(layer, DepthAttention):
                found.add((layer.norm.num_channels, config.groups, False, False))
    return sorted(found)


def cases() -> list[Any]:
    """All of them; `make test` runs the narrowest of each kind and the widest of all: the interpreter is slow."""
    found = shapes()
    kinds = [[shape for shape in found if shape[2:] == kind] for kind in sorted({shape[2:] for shape in found})]
    ends = {max(found), *(kind[0] for kind in kinds)}
    on_cpu = DEVICE.type == "cpu"
    return [pytest.param(*s, marks=pytest.mark.slow if on_cpu and s not in ends else ()) for s in found]


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def case(
    channels: int, groups: int, grid: tuple[int, int, int], dtype: torch.dtype
) -> tuple[nn.GroupNorm, Tensor, Tensor, Tensor]:
    """A norm, an input with a mean of its own in every channel, modulation and the gradient that comes back."""
    norm = nn.GroupNorm(groups, channels, device=DEVICE)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * values(channels, seed=1))
        norm.bias.copy_(0.3 * values(channels, seed=2))
    mean = values(1, channels, 1, 1, 1, seed=3)
    x = (values(2, channels, *grid, seed=4) * (1 + mean.abs()) + 2 * mean).to(dtype)
    gradient = values(2, channels, *grid, seed=5, dtype=dtype)
    return norm, last(x), 0.5 * values(2, 2 * channels, seed=6, dtype=dtype), last(gradient)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def by_pytorch(norm: nn.GroupNorm, x: Tensor, modulation: Tensor | None, silu: bool) -> Tensor:
    """What `diffusion.networks.blocks` does without the kernels."""
    h = F.group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    if modulation is not None:
        scale, shift = modulation[:, :, None, None, None].to(h.dtype).chunk(2, dim=1)
        h = h * (1 + scale) + shift
    return F.silu(h) if silu else h


def run(
    norm: nn.GroupNorm, x: Tensor, modulation: Tensor | None, gradient: Tensor, *, silu: bool, fused: bool
) -> dict[str, Tensor]:
    inputs = {"x": x.detach().requires_grad_(), "weight": norm.weight, "bias": norm.bias}
    if modulation is not None:
        inputs["modulation"] = modulation.detach().requires_grad_()
    with assume_fused(fused):
        function = norm_act if fused else by_pytorch
        y = function(norm, inputs["x"], inputs.get("modulation"), silu=silu)
        gradients = torch.autograd.grad(y, list(inputs.values()), gradient)
    return {"y": y.detach(), **dict(zip(inputs, gradients, strict=True))}


@pytest.mark.parametrize(("channels", "groups", "modulated", "silu"), cases())
def test_every_width_of_the_networks_equals_pytorch_in_float32(
    channels: int, groups: int, modulated: bool, silu: bool
) -> None:
    norm, x, modulation, gradient = case(channels, groups, (2, 4, 8), torch.float32)
    given = modulation if modulated else None
    ours = run(norm, x, given, gradient, silu=silu, fused=True)
    oracle = run(norm, x, given, gradient, silu=silu, fused=False)
    for name, expected in oracle.items():
        assert ours[name].dtype == expected.dtype
        torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()), msg=name)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last_3d)
    assert ours["x"].is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize(("channels", "groups", "modulated", "silu"), cases())
def test_in_bfloat16_no_further_from_the_truth_than_pytorch(
    channels: int, groups: int, modulated: bool, silu: bool
) -> None:
    norm, x, modulation, gradient = case(channels, groups, (2, 4, 8), torch.bfloat16)
    given = modulation if modulated else None
    ours = run(norm, x, given, gradient, silu=silu, fused=True)
    oracle = run(norm, x, given, gradient, silu=silu, fused=False)
    exact_norm = nn.GroupNorm(groups, channels, device=DEVICE, dtype=torch.float64)
    exact_norm.load_state_dict(norm.state_dict())
    exact = run(
        exact_norm, x.double(), None if given is None else given.double(), gradient.double(), silu=silu, fused=False
    )
    for name, truth in exact.items():
        own, others = ((d[name].double() - truth).abs() for d in (ours, oracle))
        ulp = 2.0**-8 * truth.abs().max()
        assert float(own.max()) <= float(others.max()) + float(ulp), name
    # One rounding, at the end. A GPU rounds to nearest, the interpreter cuts off: half a unit in the last place or one.
    error = (ours["y"].double() - exact["y"]).abs()
    units = 0.505 if DEVICE.type == "cuda" else 1.01
    assert bool((error <= 2.0**-7 * exact["y"].abs() * units + 1e-5).all())


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 11, 13), (1, 64, 1)])
def test_rows_that_fill_no_whole_tile_or_chunk(grid: tuple[int, int, int]) -> None:
    norm, x, modulation, gradient = case(48, 8, grid, torch.float32)
    ours = run(norm, x, modulation, gradient, silu=True, fused=True)
    oracle = run(norm, x, modulation, gradient, silu=True, fused=False)
    for name, expected in oracle.items():
        torch.testing.assert_close(ours[name], expected, rtol=2e-5, atol=2e-5 * float(expected.abs().max()), msg=name)


def test_a_large_mean_costs_no_accuracy() -> None:
    norm, x, _, gradient = case(64, 8, (4, 9, 9), torch.float32)
    ours = run(norm, last(x + 300), None, gradient, silu=True, fused=True)["y"].double()
    exact = by_pytorch(nn.GroupNorm(8, 64, device=DEVICE, dtype=torch.float64), (x + 300).double(), None, False)
    weight, bias = (t.detach().double()[:, None, None, None] for t in (norm.weight, norm.bias))
    exact = F.silu(exact * weight + bias).detach()
    assert float((ours - exact).abs().max()) < 2e-4  # of inputs that float32 rounds by 3e-5


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_whole_network_learns_the_same(recomputed: bool) -> None:
    config = replace(model_preset("tiny"), width=16, groups=8, activation_checkpointing=recomputed)
    found = []
    for fused in (True, False):
        net = awake(config).train()
        x = last(values(1, 8, 3, 8, 8, seed=7))
        with assume_fused(fused):
            out = net(x, torch.full((1,), 0.4, device=DEVICE))
            out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 50
    for ours, oracle in zip(*found, strict=True):
        torch.testing.assert_close(ours, oracle, rtol=1e-3, atol=2e-5 * float(oracle.abs().max()) + 1e-7)


def awake(config: UNetConfig) -> nn.Module:
    """A network, channels last, whose zero-initialised layers are not zero."""
    torch.manual_seed(0)
    net = build_unet(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return net.to(DEVICE).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload, no-any-return]


def test_the_same_input_gives_the_same_bytes() -> None:
    norm, x, modulation, gradient = case(96, 8, (3, 9, 10), torch.float32)
    first, second = (run(norm, x, modulation, gradient, silu=True, fused=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gradient_in_another_layout_or_precision_is_taken() -> None:
    norm, x, modulation, gradient = case(48, 8, (2, 4, 4), torch.float32)
    expected = run(norm, x, modulation, gradient, silu=True, fused=True)
    other = run(norm, x, modulation, gradient.contiguous(), silu=True, fused=True)
    assert all(torch.equal(expected[name], other[name]) for name in expected)


def test_on_a_cpu_nothing_changes() -> None:
    """Triton is installed here, and yet the PyTorch operations run: the golden losses stay what they are."""
    x = last(torch.zeros(1, 8, 2, 4, 4))
    assert not is_fused(x)
    with assume_fused():
        assert is_fused(x)
        assert not is_fused(x.contiguous())
        assert not is_fused(torch.zeros(1, 8, 4))
    with assume_fused(False):
        assert not is_fused(x)


def test_the_kernels_check_themselves_against_pytorch() -> None:
    with assume_fused():
        assert largest_difference(DEVICE) < 1e-5


@pytest.mark.parametrize("failure", ["raises", "differs", "switched off"])
def test_a_device_where_they_fail_falls_back(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(device: torch.device) -> float:
        if failure == "raises":
            raise RuntimeError("no compiler")
        return 0.5

    monkeypatch.setattr(fused_norm, "largest_difference", broken)
    if failure == "switched off":
        monkeypatch.setenv("CTPIPE_TRITON", "0")
    fused_norm.usable.cache_clear()
    with caplog.at_level("INFO", "ctpipe.kernels"):
        assert fused_norm.usable(0) is False
    fused_norm.usable.cache_clear()
    assert {"raises": "no compiler", "differs": "5.0e-01", "switched off": "CTPIPE_TRITON"}[failure] in caplog.text


def test_every_kernel_compiles_for_an_a100_and_an_h100(tmp_path: Path) -> None:
    f, i = "*fp32", "i32"
    wanted: list[tuple[str, list[str], dict[str, object]]] = []
    tile: dict[str, object] = {"ROWS": 32, "BLOCK": 64}
    for x in ("*bf16", "*fp32"):
        for silu in (True, False):
            wanted += [
                ("apply_kernel", [x, f, x, i, i], {**tile, "SILU": silu}),
                ("gradient_sums_kernel", [x, x, f, f, i, i, i], {"CHUNK": 1024, **tile, "SILU": silu}),
                ("input_gradient_kernel", [x, x, f, f, x, i, i], {**tile, "SILU": silu}),
            ]
        wanted.append(("moments_kernel", [x, f, i, i, i], {"CHUNK": 1024, **tile}))
    for modulated in (True, False):
        constants: dict[str, object] = {"CHUNK": 1024, "PARTS": 32, "WIDTH": 64, "MODULATED": modulated}
        wanted.append(("coefficients_kernel", [f, f, f, "*bf16", f, f, i, i, i, i, "fp32"], constants))
    wanted.append(("gradient_coefficients_kernel", [f, f, f, f, f, i, i, i, i], {"PARTS": 32, "WIDTH": 64}))
    assert len(compile_for_gpus("diffusion.networks.triton_norm", wanted, tmp_path)) == 2 * len(wanted)


@pytest.mark.cuda
@needs_gpu
def test_on_a_gpu_they_are_what_runs() -> None:
    x = last(torch.zeros(1, 8, 2, 4, 4, device=DEVICE))
    assert is_fused(x)
    assert not is_fused(x.contiguous())
