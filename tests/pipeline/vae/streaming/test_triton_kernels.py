"""The VAE's kernels and transfers: equal to the plain slabs, whatever the order in which copies happen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline.vae import KlAutoencoder, Vae, VaeArchitecture, VaeWeights, load_vae
from pipeline.vae.streaming import SlabExecutor, fused as vae_fused
from pipeline.vae.streaming.fused import DeviceMoments, assume_fused, is_fused, largest_difference
from pipeline.vae.streaming.group_norm import ChannelMoments
from pipeline.vae.streaming.transfers import AtOnce, Lanes, Mark, copy_slices
from tests.support.triton_on_cpu import DEVICE, compile_for_gpus, kernels, needs_gpu

vae_triton = kernels("pipeline.vae.streaming.triton_kernels")
# Lanes beyond the last voxel hold no data; NumPy, which the interpreter computes with, warns of what comes of them.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
SMALL = VaeArchitecture(channels=(16, 32), num_res_blocks=(1, 1), norm_num_groups=8)


def networks() -> list[nn.Module]:
    """The published architecture and the shipped one, without weights."""
    with torch.device("meta"):
        return [KlAutoencoder(a) for a in (VaeArchitecture(), VaeArchitecture.from_dict(load_vae("tiny").architecture))]


def widths() -> list[int]:
    """Channels of everything that is normalised, or that a convolution writes with its statistics or without."""
    layers = [layer for network in networks() for layer in network.modules()]
    found = {layer.num_channels for layer in layers if isinstance(layer, nn.GroupNorm)}
    found |= {layer.out_channels for layer in layers if isinstance(layer, nn.Conv3d)}
    return sorted(found - {1})


def one_channel_layers() -> list[tuple[int, int]]:
    """(channels in, channels out) of the layers that read or write an image."""
    layers = [layer for network in networks() for layer in network.modules() if isinstance(layer, nn.Conv3d)]
    return sorted({(x.in_channels, x.out_channels) for x in layers if 1 in (x.in_channels, x.out_channels)})


def test_the_widths_are_the_networks() -> None:
    assert {4, 64, 128, 256} <= set(widths())
    assert {(1, 64), (64, 1)} < set(one_channel_layers()), "and those of the shipped VAE"


@pytest.fixture(scope="module")
def vae() -> Vae:
    torch.manual_seed(0)
    return Vae(VaeWeights(KlAutoencoder(SMALL).state_dict(), SMALL, ""), DEVICE, dtype=torch.float32)


def volume() -> Tensor:
    return torch.rand((6, 6, 10), generator=torch.Generator().manual_seed(1)) * 2 - 1


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("offload", [False, True])
def test_encode_and_decode_equal_the_plain_slabs(vae: Vae, offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "_executor", lambda plan: SlabExecutor(8_000, offload=offload))
    found: list[tuple[Tensor, Tensor]] = []
    for fused in (True, False):
        with assume_fused(fused):
            latent = vae.encode(volume(), pad_multiple_zyx=(2, 2, 2))
            found.append((latent, vae.decode(found[0][0] if found else latent, (6, 6, 10))))
    for ours, plain in zip(*found, strict=True):
        close(ours, plain)


def test_the_slabs_do_not_show_in_the_statistics() -> None:
    """To the bit, so that a plan, which depends on free memory, does not change a latent."""
    y = torch.randn((5, 7, 9, 16), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = []
    for cuts in ((0, 5), (0, 1, 4, 5)):
        moments = DeviceMoments(16)
        for start, stop in pairwise(cuts):
            out = torch.empty_like(y[start:stop])
            moments.append(vae_triton.finish(y[start:stop], torch.ones(16, device=DEVICE), None, out), 63, 2048)
        found.append(moments.totals())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    expected = ChannelMoments(16)
    expected.add(y.cpu() + 1)
    close(found[0][1].cpu(), expected.mean)
    close(found[0][2].cpu(), expected.m2)


@pytest.mark.parametrize("channels", widths())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_width_of_the_networks(channels: int, dtype: torch.dtype) -> None:
    """Against float64: within float32's error, or what rounding the result to bfloat16 costs. Parts of wider
    activations and of windows as `vae_executor` makes them; the output in the shortcut's own memory."""
    random = torch.Generator().manual_seed(3)
    wide = torch.randn((2, 2, 3, 5, channels), generator=random).to(DEVICE, dtype)
    x, y = wide[:, 1], wide[:, 0]
    scale, shift = torch.randn((2, channels), generator=random).to(DEVICE)
    window = torch.zeros((2, 4, 6, channels), dtype=dtype, device=DEVICE)
    vae_triton.normalise(x, window[:, :3, :5], scale, shift, silu=True)
    u = x.double() * scale.double() + shift.double()
    within(window[:, :3, :5], u * torch.sigmoid(u))
    assert window[:, 3:].abs().max() == window[:, :, 5:].abs().max() == 0
    bias = scale.to(dtype)
    exact = x.double() + bias.double() + y.double()
    partial = vae_triton.finish(x.contiguous(), bias, y, y)
    within(y, exact)
    rows = y.double().flatten(1, 2)
    close(partial[:, 0].double(), rows.mean(1))
    close(partial[:, 1].double(), 15 * rows.var(1, correction=0))


def within(found: Tensor, exact: Tensor) -> None:
    # A GPU rounds to nearest, the interpreter cuts off: half a unit in the last place of bfloat16, or one.
    unit = (2.0**-8 if DEVICE.type == "cuda" else 2.0**-7) if found.dtype == torch.bfloat16 else 0.0
    assert bool(((found.double() - exact).abs() <= unit * exact.abs() * 1.01 + 1e-5 * exact.abs().max()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_first_and_last_layer_of_the_networks(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(4)
    for into, out in one_channel_layers():
        layer = nn.Conv3d(into, out, 3, device=DEVICE).to(dtype)
        window = torch.randn((4, 5, 7, into), generator=random).to(DEVICE, dtype)
        found = torch.empty((2, 5, 7, out), dtype=dtype, device=DEVICE)
        assert layer.bias is not None
        taps = vae_fused.taps_first(layer.weight.detach())
        if into == 1:
            partial = vae_triton.first_convolution(window, taps, layer.bias.detach(), found)
            close(partial[:, 0].double(), found.double().mean((1, 2)))
        else:
            vae_triton.last_convolution(window, taps, layer.bias.detach(), found)
        image = window.double().permute(3, 0, 1, 2)[None]
        with torch.no_grad():
            exact = nn.functional.conv3d(image, layer.weight.double(), layer.bias.double(), padding=(0, 1, 1))
        within(found, exact[0].permute(1, 2, 3, 0))


def test_slices_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_triton, "CHUNK", 64)
    y = torch.randn((2, 9, 17, 16), generator=torch.Generator().manual_seed(5)).to(DEVICE) + 100
    out, moments = torch.empty_like(y), DeviceMoments(16)
    moments.append(vae_triton.finish(y, torch.zeros(16, device=DEVICE), None, out), 153, 64)
    count, mean, m2 = moments.totals()
    exact = y.double().flatten(0, 2)
    assert float(count) == len(exact)
    close(mean, exact.mean(0))
    torch.testing.assert_close(m2 / count, exact.var(0, correction=0), rtol=1e-4, atol=0)
    assert torch.equal(out, y)


def test_device_statistics_by_pytorch_alone_are_those_of_the_cpu() -> None:
    x = torch.randn((4, 5, 6, 8), generator=torch.Generator().manual_seed(6)).to(DEVICE) + 3
    moments, expected = DeviceMoments(8), ChannelMoments(8)
    for slab in (x[:1], x[1:4]):
        moments.add(slab)
        expected.add(slab.cpu())
    norm = nn.GroupNorm(4, 8)
    for ours, cpu in zip(moments.affine(norm.to(DEVICE)), expected.affine(nn.GroupNorm(4, 8)), strict=True):
        close(ours.cpu(), cpu)


class Later(AtOnce):
    """A lane whose copies happen as late as their marks allow: only once something waits for them. What is
    overwritten before, or used without waiting, then shows."""

    def __init__(self, after_all: list[Callable[[], None]]) -> None:
        self.waiting: list[tuple[Tensor, Tensor, LaterMark | None]] = []
        self.done = 0
        after_all.append(lambda: self.run(len(self.waiting)))

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        assert after is None or isinstance(after, LaterMark)
        self.waiting.append((target, source, after))
        return LaterMark(self, len(self.waiting))

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, LaterMark)
        mark.lane.run(mark.position)

    def run(self, position: int) -> None:
        while self.done < position:
            target, source, after = self.waiting[self.done]
            self.done += 1
            if after is not None:
                after.lane.run(after.position)
            copy_slices(target, source)


class LaterMark(Mark):
    def __init__(self, lane: Later, position: int) -> None:
        self.lane, self.position = lane, position


@pytest.mark.parametrize("late", ["both", "up", "down"])
def test_copies_as_late_as_allowed_change_nothing(vae: Vae, late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both directions late, or one late and one at once: the results are those without host memory, to the bit."""
    if DEVICE.type == "cuda":
        pytest.skip("a model of streams for machines without any; a GPU has its own test")
    unit = torch.rand((12, 16, 20), generator=torch.Generator().manual_seed(7)) * 2 - 1
    monkeypatch.setattr(vae, "_executor", lambda plan: SlabExecutor(30_000))
    expected = vae.encode(unit, pad_multiple_zyx=(2, 2, 2))
    image = vae.decode(expected, (11, 16, 20))
    used: list[Callable[[], None]] = []

    def lanes(device: torch.device) -> Lanes:
        up = Later(used) if late in ("both", "up") else AtOnceMarked()
        down = Later(used) if late in ("both", "down") else AtOnceMarked()
        return Lanes(up, down)

    monkeypatch.setattr(Lanes, "of", lanes)
    monkeypatch.setattr(vae, "_executor", lambda plan: SlabExecutor(30_000, offload=True))
    assert torch.equal(vae.encode(unit, pad_multiple_zyx=(2, 2, 2)), expected)
    assert torch.equal(vae.decode(expected, (11, 16, 20)), image)
    assert used


class AtOnceMarked(Later):
    """A lane that copies at once, and whose marks a late lane understands."""

    def __init__(self) -> None:
        super().__init__([])

    def copy(self, target: Tensor, source: Tensor, after: Mark | None) -> Mark:
        mark = super().copy(target, source, after)
        self.run(len(self.waiting))
        return mark


def test_a_lane_that_nobody_waits_for_is_noticed(vae: Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: without the waiting, the results differ."""
    monkeypatch.setattr(vae, "_executor", lambda plan: SlabExecutor(30_000))
    unit = torch.rand((12, 16, 20), generator=torch.Generator().manual_seed(7)) * 2 - 1
    expected = vae.encode(unit, pad_multiple_zyx=(2, 2, 2))
    monkeypatch.setattr(Lanes, "of", lambda device: Lanes(Later([]), Later([])))
    monkeypatch.setattr(Lanes, "last_download", lambda self, values: None)
    monkeypatch.setattr(vae, "_executor", lambda plan: SlabExecutor(30_000, offload=True))
    assert not torch.equal(vae.encode(unit, pad_multiple_zyx=(2, 2, 2)), expected)


def test_on_a_cpu_nothing_changes_and_a_failing_device_falls_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert not is_fused(torch.device("cpu"))
    assert not is_fused(torch.device("meta"))
    monkeypatch.setattr(vae_fused, "largest_difference", lambda device: 0.5)
    vae_fused.usable.cache_clear()
    assert vae_fused.usable(0) is False
    vae_fused.usable.cache_clear()
    assert "5.0e-01" in caplog.text


def test_the_kernels_check_themselves_against_pytorch() -> None:
    assert largest_difference(DEVICE) < 1e-5


def test_every_kernel_compiles_for_an_a100_and_an_h100(tmp_path: Path) -> None:
    f, i = "*fp32", "i32"
    tile: dict[str, object] = {"ROWS": 32, "BLOCK": 64}
    wanted: list[tuple[str, list[str], dict[str, object]]] = []
    for x in ("*bf16", "*fp32"):
        for given in (True, False) if x == "*bf16" else ():
            constants = {**tile, "AFFINE": given, "SILU": given}
            wanted.append(("normalise_kernel", [x, f, f, x, i, i, i, "i64", "i64", i], constants))
            types = [x, x, x, x, f, i, i, i, i, "i64", "i64", "i64", i]
            wanted.append(("finish_kernel", types, {"CHUNK": 2048, **tile, "SHORTCUT": given}))
        types = [x, x, x, x, f, i, i, i, i, "i64", i]
        wanted.append(("first_convolution_kernel", types, {"CHUNK": 2048, **tile, "TAPS": 32, "WIDEN": False}))
        wanted.append(("last_convolution_kernel", [x, x, x, x, i, i, i], tile))
    assert len(compile_for_gpus("pipeline.vae.streaming.triton_kernels", wanted, tmp_path)) == 2 * len(wanted)


@pytest.mark.cuda
@needs_gpu
def test_on_a_gpu_offloading_changes_nothing_however_often() -> None:
    torch.manual_seed(0)
    architecture = VaeArchitecture()
    vae = Vae(VaeWeights(KlAutoencoder(architecture).state_dict(), architecture, ""), DEVICE)
    unit = torch.rand(48, 256, 256) * 2 - 1
    assert is_fused(DEVICE)
    vae._executor = lambda plan: SlabExecutor(8 << 20)  # type: ignore[method-assign]
    expected = vae.encode(unit)
    vae._executor = lambda plan: SlabExecutor(8 << 20, offload=True)  # type: ignore[method-assign]
    assert all(torch.equal(vae.encode(unit), expected) for _ in range(5))
