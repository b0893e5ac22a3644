"""Perceptual distance on VGG19 features (Johnson et al. 2016; Simonyan and Zisserman 2015, table 1, column E).

The weights are the user's: the ImageNet state dict of torchvision's ``vgg19``, as a ``.pth`` or ``.safetensors`` file.
Nothing is downloaded.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from latentcache import InputError

PLAN: tuple[int | str, ...] = (64, 64, "M", 128, 128, "M", *([256] * 4), "M", *([512] * 4), "M", *([512] * 4))
"""Output channels of each 3x3 convolution, each followed by ReLU; M halves the grid."""
SMALLEST = 16
"""Pixels a side: four poolings lie before the last features."""


class VGG19Features(nn.Module):
    """The last activations before each pooling (relu1_2, relu2_2, relu3_4, relu4_4) and relu5_4, frozen.

    Module names and indices are torchvision's ``features.N``, so that its state dict fits.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []
        channels = 3
        for item in PLAN:
            if isinstance(item, str):
                self.taps.append(len(layers) - 1)
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU()]
                channels = item
        self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    mean: Tensor
    std: Tensor

    def forward(self, unit_NHW: Tensor) -> list[Tensor]:
        """Feature maps of grey images (N, H, W) in [-1, 1], finest first."""
        x = (unit_NHW[:, None].expand(-1, 3, -1, -1) * 0.5 + 0.5 - self.mean) / self.std
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x)
        return found


def load_vgg19(path: str | Path | None, device: torch.device | str = "cpu") -> VGG19Features:
    """VGG19's convolutions from a torchvision state dict.

    Raises:
        InputError: No path, no file, not a state dict, or tensors missing or of another shape (named).
    """
    remedy = (
        "Name a state dict of torchvision's vgg19 (vgg19-dcbb9e9d.pth, 575 MB) with --set losses.vgg19_weights=PATH, "
        "or switch the term off with --set losses.perceptual_weight=0."
    )
    expected = "the state dict of torchvision's vgg19 as .pth or .safetensors"
    if path is None:
        raise InputError("the perceptual loss without VGG19 weights", expected=expected, remedy=remedy)
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no file {path}", expected=expected, remedy=remedy)
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__})", expected=expected, remedy=remedy) from error
    model = VGG19Features()
    wanted = model.state_dict()
    found = state if isinstance(state, dict) else {}
    wrong = [
        name
        for name, tensor in wanted.items()
        if not isinstance(found.get(name), Tensor) or found[name].shape != tensor.shape
    ]
    if wrong:
        raise InputError(
            f"{len(wanted) - len(wrong)}/{len(wanted)} VGG19 tensors in {path}; missing or misshapen: "
            + ", ".join(wrong[:3])
            + (", ..." if len(wrong) > 3 else ""),
            expected=expected,
            remedy=remedy,
        )
    model.load_state_dict({name: found[name] for name in wanted})
    return model.to(device)


def perceptual_distance(vgg: VGG19Features, predicted_NHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Mean absolute feature difference over the five maps, (N,) float32; gradient through the prediction alone."""
    if min(predicted_NHW.shape[-2:]) < SMALLEST:
        raise InputError(
            f"images of {predicted_NHW.shape[-2]} x {predicted_NHW.shape[-1]} pixels",
            expected=f"at least {SMALLEST} pixels a side for VGG19",
            remedy="Use a larger crop, or set the perceptual weight to 0.",
        )
    with torch.no_grad():
        wanted = vgg(target_NHW)
    distances = [
        F.l1_loss(p.float(), w.float(), reduction="none").flatten(1).mean(1)
        for p, w in zip(vgg(predicted_NHW), wanted, strict=True)
    ]
    return torch.stack(distances).mean(0)
