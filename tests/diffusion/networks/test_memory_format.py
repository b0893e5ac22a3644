from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusion.networks import UNet, UNetConfig, build_unet, channels_last, contiguous_weights, for_generation
from diffusion.networks.memory_format import cast_weights

CONFIG = UNetConfig(16, (1, 2), 1, (1,), 2, 32, 4)


def network() -> UNet:
    torch.manual_seed(0)
    net = build_unet(CONFIG).eval().requires_grad_(False)
    for parameter in net.parameters():  # zero-initialised layers would hide the others
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return net


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_weights_that_are_cast_once_give_what_autocast_gives_and_are_cast_no_more() -> None:
    x, t = torch.randn(1, 8, 4, 8, 8), torch.tensor([0.31])
    outputs, casts = [], []
    for net in (network(), cast_weights(network(), torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
            outputs.append(net(x, t))
        sizes = [list(event.input_shapes) for event in profile.events()]
        casts.append(sum(event.name == "aten::_to_copy" for event in profile.events()))
        assert sizes
    assert torch.equal(outputs[0], outputs[1])
    layers = sum(isinstance(m, (nn.Conv3d, nn.Linear)) for m in network().modules())
    assert casts[1] <= casts[0] - layers, "a cast of every layer's weight at every call is what is spared"


def test_the_norms_keep_their_precision() -> None:
    net = cast_weights(network(), torch.bfloat16)
    kinds = {type(m).__name__: {p.dtype for p in m.parameters(recurse=False)} for m in net.modules()}
    assert kinds["Conv3d"] == kinds["Linear"] == {torch.bfloat16}
    assert kinds["GroupNorm"] == kinds["RMSNorm"] == {torch.float32}


def test_a_gpu_generates_in_the_layout_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    monkeypatch.setattr(nn.Module, "to", _without_device(nn.Module.to))
    made = for_generation(net, torch.device("cuda"))
    assert made.conv_in.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert made.conv_in.weight.dtype == torch.bfloat16
    assert next(for_generation(network(), torch.device("cpu")).parameters()).dtype == torch.float32


def _without_device(real):  # type: ignore[no-untyped-def]
    """``Module.to`` where there is no GPU: all but the move."""

    def to(self, *arguments, **options):  # type: ignore[no-untyped-def]
        if arguments and isinstance(arguments[0], torch.device):
            return self
        return real(self, *arguments, **options)

    return to


def test_contiguous_weights_hand_their_layout_on_to_the_activations() -> None:
    net, seen = channels_last(network()), []
    net.down[0].register_forward_hook(
        lambda _m, _i, out: seen.append(out.is_contiguous(memory_format=torch.channels_last_3d))
    )
    contiguous_weights(net)
    assert all(p.is_contiguous() for p in net.parameters())
    net(torch.randn(2, 8, 4, 8, 8), torch.tensor([0.5, 0.7]))
    assert seen == [True]


@pytest.mark.cuda
def test_a_gpu_gives_the_same_with_weights_cast_once() -> None:
    device = torch.device("cuda")
    x, t = torch.randn(1, 8, 8, 16, 16, device=device), torch.tensor([0.31], device=device)
    with torch.autocast("cuda", torch.bfloat16):
        plain = channels_last(network().to(device))(x, t)
        once = for_generation(network(), device)(x, t)
    assert torch.allclose(plain, once, atol=1e-2)
