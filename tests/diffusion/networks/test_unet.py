"""The U-Net: size, shapes, independence of batch mates, recomputation, in-plane folding and golden numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from diffusion.networks import (
    MODEL_PRESETS,
    DepthAttention,
    ResidualBlock,
    UNet,
    UNetConfig,
    build_unet,
    model_preset,
    parameter_count,
)
from diffusion.networks.blocks import TimeEmbedding, fold_patches, unfold_patches
from latentcache import InputError

SMALL = UNetConfig(
    width=8, multipliers=(1, 2), blocks_per_level=1, attention_levels=(1,), heads=2, time_embedding=16, groups=4
)


def awake(config: UNetConfig, seed: int = 0) -> UNet:
    """A network whose zero-initialised layers are not zero, as after training."""
    torch.manual_seed(seed)
    model = build_unet(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_medium_has_599_million_parameters_within_one_percent() -> None:
    assert parameter_count(model_preset("medium")) == pytest.approx(599e6, rel=0.01)
    assert parameter_count(model_preset("classic")) == pytest.approx(599e6, rel=0.01)


def test_presets_have_the_shape_that_the_design_names() -> None:
    medium, classic = MODEL_PRESETS["medium"], MODEL_PRESETS["classic"]
    assert medium.channels == (192, 384, 768, 768)
    assert (medium.blocks_per_level, medium.attention_levels, medium.heads, medium.time_embedding) == (
        2,
        (1, 2),
        8,
        1024,
    )
    assert medium.in_plane_multiple == 8
    assert classic == replace(medium, latent_patch=2, told=False), "the eight channels of its predecessor, no more"
    with torch.device("meta"):
        folded = UNet(classic)
    assert (folded.conv_in.in_channels, folded.conv_out.out_channels) == (32, 16)
    assert 0.5e6 < parameter_count(model_preset("tiny")) < 2e6


@pytest.mark.parametrize("preset", ["tiny", "medium", "classic"])
@pytest.mark.parametrize("depth", [1, 7, 16])
def test_any_depth_and_every_multiple_in_plane_pass(preset: str, depth: int) -> None:
    config = model_preset(preset)
    height, width = config.in_plane_multiple, 2 * config.in_plane_multiple
    with torch.device("meta"):
        out = UNet(config)(torch.empty(2, 8, depth, height, width), torch.empty(2))
    assert out.shape == (2, 4, depth, height, width)


def test_an_untrained_network_says_zero() -> None:
    torch.manual_seed(0)
    assert not build_unet(SMALL)(noise(1, 8, 3, 4, 4), torch.rand(1)).any()


def test_every_parameter_learns() -> None:
    model = awake(SMALL).train()
    model(noise(2, 8, 3, 4, 4), torch.tensor([0.2, 0.9])).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    model = awake(SMALL).double()
    x, t = noise(3, 8, 5, 4, 4).double(), torch.tensor([0.1, 0.5, 0.9])
    together = model(x, t)
    for b in range(3):
        alone = model(x[b : b + 1], t[b : b + 1])
        assert torch.allclose(alone[0], together[b], atol=1e-12)
    changed = x.clone()
    changed[1:] *= 100
    assert torch.allclose(model(changed, t)[0], together[0], atol=1e-12)


def test_recomputation_changes_no_gradient() -> None:
    x, t = noise(1, 8, 3, 4, 4), torch.tensor([0.3])
    grads = []
    for checkpointing in (False, True):
        model = awake(replace(SMALL, activation_checkpointing=checkpointing)).train()
        model(x, t).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_channels_last_gives_the_same_numbers() -> None:
    model = awake(SMALL)
    x, t = noise(1, 8, 4, 4, 4), torch.tensor([0.3])
    wanted = model(x, t)
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    got = model(x.contiguous(memory_format=torch.channels_last_3d), t)
    assert torch.allclose(got, wanted, atol=2e-4)


@given(
    patch=st.integers(1, 3),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
@settings(max_examples=25, deadline=None)
def test_folding_in_plane_is_undone_exactly(patch: int, shape: tuple[int, int, int, int, int]) -> None:
    b, c, d, h, w = shape
    x = noise(b, c, d, h * patch, w * patch)
    folded = fold_patches(x, patch)
    assert folded.shape == (b, c * patch * patch, d, h, w)
    assert torch.equal(unfold_patches(folded, patch), x)
    assert torch.equal(folded[:, :: patch * patch], x[:, :, :, ::patch, ::patch])


def test_attention_mixes_along_depth_only() -> None:
    torch.manual_seed(0)
    layer = DepthAttention(8, 4, 2)
    torch.nn.init.normal_(layer.out.weight)
    layer.norm = torch.nn.GroupNorm(8, 8).requires_grad_(False)
    x = noise(1, 8, 4, 2, 2)
    moved = x.clone()
    # Equal mean and spread of every channel, so that GroupNorm carries nothing over: swap two slices of one column.
    moved[:, :, [0, 1], 0, 0] = x[:, :, [1, 0], 0, 0]
    a, b = layer(x), layer(moved)
    changed = (a - b).abs().amax(dim=(0, 1)) > 1e-5
    assert changed[:2, 0, 0].all()
    assert not changed[:, 0, 1].any()
    assert not changed[:, 1].any()


def test_queries_and_keys_are_normalised() -> None:
    """Attention logits stay bounded however large the activations, which is what QK-norm is for."""
    torch.manual_seed(0)
    layer = DepthAttention(8, 4, 2)
    torch.nn.init.normal_(layer.out.weight)
    with torch.no_grad():
        layer.qkv.weight[:16] *= 1e4
    a = layer(noise(1, 8, 4, 2, 2))
    with torch.no_grad():
        layer.qkv.weight[:16] *= 1e2
        layer.qkv.bias[:16] *= 1e2
    assert torch.allclose(layer(noise(1, 8, 4, 2, 2)), a, atol=1e-4)


def test_time_embedding_tells_neighbouring_steps_apart_even_in_half_precision() -> None:
    torch.manual_seed(0)
    embed = TimeEmbedding(32, 32).bfloat16()
    t = torch.tensor([0.998, 0.999], dtype=torch.float32)
    first, second = embed(t)
    assert not torch.equal(first, second)


def test_residual_block_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    x = noise(1, 8, 2, 3, 3)
    assert torch.equal(ResidualBlock(8, 8, 4, 16)(x, noise(1, 16)), x)


def test_a_grid_that_does_not_fit_is_refused_with_the_multiple() -> None:
    with pytest.raises(InputError, match="multiples of 2"):
        build_unet(SMALL)(torch.zeros(1, 8, 3, 5, 4), torch.zeros(1))
    with pytest.raises(InputError, match="followed by the condition"):
        build_unet(SMALL)(torch.zeros(1, 4, 3, 4, 4), torch.zeros(1))


def test_config_survives_json_and_names_the_nearest_key() -> None:
    for config in MODEL_PRESETS.values():
        assert UNetConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="Did you mean 'latent_patch'"):
        UNetConfig.from_dict({"latent_patches": 2})
    with pytest.raises(InputError, match="tiny, medium, classic"):
        model_preset("huge")


@pytest.mark.parametrize(
    "wrong", [{"groups": 7}, {"heads": 5}, {"attention_levels": (4,)}, {"latent_patch": 0}, {"multipliers": ()}]
)
def test_impossible_shapes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        replace(MODEL_PRESETS["medium"], **wrong)  # type: ignore[arg-type]


GOLDEN = [0.0693435844, 0.3058339619, 0.1191720260, 0.2159044463, 0.3278716593, 0.2087670023]


def golden_unet() -> UNet:
    """Weights from a formula, so that no random generator stands between the numbers and the architecture."""
    model = build_unet(SMALL)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            ramp = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((0.2 * torch.sin(ramp * 0.7 + number)).reshape(parameter.shape))
    return model.double().eval()


def test_golden_numbers() -> None:
    """Computed once by this code; any change of the architecture shows here."""
    x = torch.sin(torch.arange(8 * 3 * 4 * 4, dtype=torch.float64) * 0.37).reshape(1, 8, 3, 4, 4)
    out = golden_unet()(x, torch.tensor([0.25]))
    found = [out.mean().item(), out.std().item(), *out.flatten()[[0, 50, 100, 191]].tolist()]
    assert found == pytest.approx(GOLDEN, rel=1e-6)
