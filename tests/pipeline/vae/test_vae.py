"""The VAE against MONAI's classes: same numbers at every depth, slab size and place of the activations."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import nn

from latentcache import Encoding, InputError, NonFiniteError
from pipeline.vae import Vae, load_vae
from pipeline.vae.streaming import Plan, SlabExecutor
from pipeline.vae.vae import padded_shape
from pipeline.vae.weights import TINY, load_weights
from tests.support import vae_oracle as oracle

CPU = torch.device("cpu")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = oracle.monai_maisi(**oracle.NARROW)
    return model, oracle.save(model, tmp_path_factory.mktemp("vae") / "maisi.safetensors", oracle.NARROW)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    model = oracle.monai_maisi(**oracle.FULL)
    return model, oracle.save(model, tmp_path_factory.mktemp("vae") / "maisi.safetensors", None)


def test_another_vae_than_expected_is_refused() -> None:
    sha256 = load_vae("tiny").sha256
    encoding = Encoding(sha256, {}, 40.0, 400.0)
    assert load_vae("tiny", expected=encoding).sha256 == sha256
    with pytest.raises(InputError, match=f"{sha256[:12]}.*the one that encoded these latents, 0000.*--vae"):
        load_vae("tiny", expected=replace(encoding, vae_sha256="0" * 64))


def compare(model: nn.Module, vaes: Vae | list[Vae], shape: tuple[int, int, int]) -> None:
    """Encode and decode a volume with MONAI's model once and with every one of ours."""
    unit = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    image = oracle.padded(unit)
    mean, sigma = model.encode(image)
    d, h, w = shape
    theirs = model.decode(mean)[0, 0, :d, :h, :w] * 2 - 1
    assert theirs.abs().max() < 1, "the oracle's output must not reach the clamp"
    for vae in vaes if isinstance(vaes, list) else [vaes]:
        both = vae.encode(unit, with_variance=True)
        assert both.shape == (8, *(n // 4 for n in image.shape[2:]))
        assert oracle.relative(both[:4], mean[0]) < TOLERANCE
        assert oracle.relative(torch.exp(both[4:] / 2), sigma[0]) < TOLERANCE
        decoded = vae.decode(mean[0], shape)
        assert tuple(decoded.shape) == shape
        assert oracle.relative(decoded, theirs) < TOLERANCE


@pytest.mark.parametrize("shape", [(4, 32, 64), (7, 40, 33), (13, 32, 32), (5, 64, 256)])
def test_equals_monai_unsplit(narrow: tuple[nn.Module, Path], shape: tuple[int, int, int]) -> None:
    model, path = narrow
    compare(model, [Vae(load_weights(path), CPU, slab_bytes=n) for n in (1, 150_000, 1 << 30)], shape)


@pytest.mark.parametrize("depth", [50, 54])
def test_odd_depths_come_back_whole(narrow: tuple[nn.Module, Path], depth: int) -> None:
    model, path = narrow
    compare(model, Vae(load_weights(path), CPU, slab_bytes=400_000), (depth, 32, 32))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(depth=st.integers(1, 21), slab_bytes=st.integers(1, 300_000))
def test_any_depth_and_any_slab(narrow: tuple[nn.Module, Path], depth: int, slab_bytes: int) -> None:
    model, path = narrow
    compare(model, Vae(load_weights(path), CPU, slab_bytes=slab_bytes), (depth, 32, 32))


@pytest.mark.parametrize(
    ("shape", "slab_bytes"),
    [((6, 32, 32), 1), ((13, 32, 32), 1 << 20), ((4, 64, 64), 16 << 20), ((9, 32, 32), 1 << 30)],
)
def test_full_width_equals_monai(full: tuple[nn.Module, Path], shape: tuple[int, int, int], slab_bytes: int) -> None:
    model, path = full
    vae = Vae(load_weights(path), CPU, slab_bytes=slab_bytes)
    assert sum(p.numel() for p in vae.network.parameters()) == 20_944_897
    assert len(vae.network.state_dict()) == 130
    compare(model, vae, shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depth", "side"), [*itertools.product([4, 17, 50, 54, 61], [64]), (16, 128), (8, 256), (4, 512)]
)
def test_full_width_grid(full: tuple[nn.Module, Path], depth: int, side: int) -> None:
    model, path = full
    weights = load_weights(path)
    compare(model, [Vae(weights, CPU, slab_bytes=n) for n in (1, 16 << 20, 1 << 30)], (depth, side, side))


def test_plain_autoencoder_upsamples_to_the_nearest_voxel(tmp_path: Path) -> None:
    """MONAI's two classes share a state dict and differ in the decoder: by its names the loader tells them apart."""
    model = oracle.monai_kl(**oracle.NARROW)
    vae = load_vae(oracle.save(model, tmp_path / "kl.safetensors", oracle.NARROW))
    assert vae.architecture["upsampling"] == "nearest"
    compare(model, vae, (9, 32, 40))


def test_activations_in_host_memory(narrow: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The offloading path, with the CPU in both parts."""
    model, path = narrow
    vae = Vae(load_weights(path), CPU)
    monkeypatch.setattr(vae, "_executor", lambda plan: SlabExecutor(100_000, offload=True))
    compare(model, vae, (10, 32, 32))


def test_bfloat16_is_close(narrow: tuple[nn.Module, Path]) -> None:
    model, path = narrow
    unit = torch.rand((8, 32, 32), generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean = model.encode(oracle.padded(unit))[0][0]
    ours = load_vae(path, dtype=torch.bfloat16).encode(unit)
    assert float((ours - mean).std() / mean.std()) < 0.03


def test_same_bytes_again(narrow: tuple[nn.Module, Path]) -> None:
    unit = np.random.default_rng(0).uniform(-1, 1, (9, 40, 40)).astype(np.float32)
    first, second = (load_vae(narrow[1]).encode(unit) for _ in range(2))
    assert torch.equal(first, second)


def test_free_memory_does_not_show_in_the_bytes() -> None:
    """No encode key can hold it. Other slabs give other low bits in wide layers, so on a CPU there is one plan only."""
    weights = load_weights(TINY)
    unit = torch.rand((11, 40, 64), generator=torch.Generator().manual_seed(5)) * 2 - 1
    plenty, scarce = Vae(weights, CPU, memory_gib=64), Vae(weights, CPU)
    plan = plenty.plan_encode((12, 64, 64))
    scarce.memory_gib = plan.device_bytes / 2**30
    assert scarce.plan_encode((12, 64, 64)) == plan
    assert torch.equal(plenty.encode(unit), scarce.encode(unit))
    scarce.memory_gib *= 0.999
    with pytest.raises(InputError, match="GiB free"):
        scarce.encode(unit)


def test_decode_slab_is_the_unsplit_network_with_gradients(narrow: tuple[nn.Module, Path]) -> None:
    model, path = narrow
    latents = torch.randn(2, 4, 2, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    image = load_vae(path).decode_slab(latents)
    assert image.shape == (2, 1, 8, 32, 32)
    assert oracle.relative(image.detach(), model.decode(latents.detach()) * 2 - 1) < 1e-5
    image.square().mean().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().max()) > 0


@given(shape=st.tuples(*[st.integers(1, 700)] * 3), multiple=st.tuples(*[st.integers(1, 16).map(lambda n: 4 * n)] * 3))
def test_padding_is_the_least(shape: tuple[int, int, int], multiple: tuple[int, int, int]) -> None:
    for length, least, out in zip(shape, multiple, padded_shape(shape, multiple), strict=True):
        assert out % least == 0
        assert length <= out < length + least


def test_bad_input_is_refused(narrow: tuple[nn.Module, Path]) -> None:
    vae = load_vae(narrow[1])
    volume = np.zeros((4, 32, 32), dtype=np.float32)
    volume[1, 2, 3] = np.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        vae.encode(volume)
    with pytest.raises(InputError, match=r"\(D, H, W\)"):
        vae.encode(np.zeros((1, 1, 4, 32, 32), dtype=np.float32))
    with pytest.raises(InputError, match="multiples of 4"):
        vae.encode(np.zeros((4, 32, 32)), pad_multiple_zyx=(2, 32, 32))
    with pytest.raises(InputError, match="valid_zyx"):
        vae.decode(torch.zeros(4, 1, 8, 8), (5, 32, 32))
    with pytest.raises(InputError, match="latents of shape"):
        vae.decode(torch.zeros(8, 1, 8, 8), (4, 32, 32))
    with pytest.raises(NonFiniteError, match="latents"):
        vae.decode(torch.full((4, 1, 8, 8), torch.inf), (4, 32, 32))


def test_a_volume_beyond_the_budget_is_refused_before_work(
    narrow: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = load_vae(narrow[1], memory_gib=0.25)
    assert isinstance(vae.plan_encode((8, 64, 64)), Plan)
    with pytest.raises(InputError, match=r"needs .* GiB for 400x512x512, with 0\.25 GiB free.*--memory-gib"):
        vae.plan_encode((400, 512, 512))
    monkeypatch.setattr(vae, "_executor", lambda _: pytest.fail("work began"))
    with pytest.raises(InputError, match=r"encoder needs .* GiB for 64x256x256"):
        vae.encode(np.zeros((64, 256, 256), dtype=np.float32))
    with pytest.raises(InputError, match=r"decoder needs .* GiB for 16x64x64"):
        vae.decode(torch.zeros(4, 16, 64, 64), (64, 256, 256))


def test_sliding_windows_are_another_function(narrow: tuple[nn.Module, Path]) -> None:
    """One window is the unsplit pass; several are not, which is why `encode` does not slide."""
    vae = load_vae(narrow[1])
    unit = torch.rand((16, 32, 64), generator=torch.Generator().manual_seed(4)) * 2 - 1
    exact = vae.encode(unit)
    assert oracle.relative(vae.encode_sliding(unit, window_zyx=(16, 32, 64)), exact) < TOLERANCE
    slid = vae.encode_sliding(unit, window_zyx=(16, 32, 32))
    assert slid.shape == exact.shape
    assert oracle.relative(slid, exact) > 1e-3
    image = vae.decode_sliding(exact, (15, 30, 61), window_zyx=(16, 32, 64))
    assert oracle.relative(image, vae.decode(exact, (15, 30, 61))) < TOLERANCE
    assert vae.decode_sliding(exact, (15, 30, 61), window_zyx=(8, 32, 32)).shape == (15, 30, 61)
    with pytest.raises(NonFiniteError, match="latents"):
        vae.decode_sliding(torch.full((4, 1, 8, 8), torch.nan), (4, 32, 32))
