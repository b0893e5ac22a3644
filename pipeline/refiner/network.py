"""The refiner's network: a 3-D residual network on the thick slices' grid, and a small head on the thin slices'.

What is to be known is in the thick slices, and there are a fifth as many of them: so nearly all of the arithmetic
happens on their grid, where three slices reach as far as fifteen thin ones. Each thin slice then mixes the features of
its two neighbours by matrices that are polynomials of where between them it is (any spacing, any phase), and two
convolutions on the thin grid add what was composed. It sees pixels, so it can pass the autoencoder's ceiling; it has no
normalisation and only local convolutions, so that a volume in tiles gives the numbers of one pass. Its last layer
starts at zero: untrained, it gives the composed slices, back-projected.

It works on cells of ``fold`` x ``fold`` pixels as channels (pixel unshuffle: Shi et al. 2016, section 3.2, reversed):
a quarter of the places at twice the channels costs the same, sees twice as far in-plane, and learns more.

Shapes: B batch, D thin and K thick slices, H rows, W columns; unit scale is the window's, [-1, 1], clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentcache import InputError
from pipeline.refiner.inputs import COMPOSED, FINE_CHANNELS, THICK_CHANNELS

DEGREE = 2
"""Of the polynomials of the place between two thick slices."""
HEAD_REACH = 2
"""Thin slices on each side that a refined slice depends on beside the thick ones."""


@dataclass(frozen=True)
class RefinerConfig:
    """Size of the network: each block of ``width`` channels reaches 2 thick slices and 2 ``fold`` pixels on."""

    width: int = 48
    blocks: int = 6
    fold: int = 2

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 0 or self.fold < 1:
            raise InputError(
                f"a refiner of width {self.width}, {self.blocks} blocks and folds of {self.fold}",
                expected="a width and a fold of at least 1, and blocks of at least 0",
                remedy="For example --width 48 --blocks 6.",
            )

    @property
    def reach(self) -> int:
        """Return how many pixels away in-plane an output depends on its input; a whole number of folds."""
        return (2 * self.blocks + 1 + HEAD_REACH) * self.fold


class ResidualBlock(nn.Module):
    """Two convolutions added to what enters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.conv2(nn.functional.silu(self.conv1(h)))
        return out


def initialise(network: nn.Module, blocks: nn.Sequential, mix: nn.Conv3d, leave: nn.Conv3d) -> None:
    """Kaiming (2015), blocks damped so that their sum stays of the size of what enters (Zhang et al. 2019).

    Untrained, a network gives what it corrects: its last layer, ``leave``, starts at zero. Blocks that begin as the
    identity leave the zero last layer nothing to learn from: the optimiser then follows noise, and at the same rate was
    0.4 dB behind after 140 steps, and sometimes diverged.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    with torch.no_grad():
        for block in blocks:
            assert isinstance(block, ResidualBlock)
            block.conv2.weight *= (8 * len(blocks)) ** -0.5
        mix.weight *= 0.5
        leave.weight.zero_()


def selection(below: Tensor, between: Tensor, like: Tensor, count: int) -> Tensor:
    """Return the weights (B, D, 2 (DEGREE + 1) K) of every thick slice's parts at the thin slices.

    A thin slice takes, of its two neighbours, parts times the powers of where between them it is.

    Args:
        below, between: (B, D) the thick slice below each thin one, and where between it and the next it is.
        like: Gives dtype and device.
        count: Thick slices K.
    """
    select = like.new_zeros(*below.shape, 2 * (DEGREE + 1), count)
    for side in range(2):
        slices = (below + side).clamp(max=count - 1)
        for power in range(DEGREE + 1):
            plane = select[:, :, side * (DEGREE + 1) + power]
            plane.scatter_(2, slices[..., None], between.to(like.dtype)[..., None] ** power)
    return select.flatten(2)


class Refiner(nn.Module):
    """Inputs as in ``refiner_input.RefinerInput``, batched, to (B, 1, D, H, W) in unit scale; any H and W."""

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__()
        self.config = config
        cell, width = config.fold**2, config.width
        self.head_width = max(1, width // 2)
        self.enter = nn.Conv3d(THICK_CHANNELS * cell, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(config.blocks)))
        self.mix = nn.Conv3d(width, 2 * (DEGREE + 1) * self.head_width, 1)
        self.head = nn.Conv3d(self.head_width + FINE_CHANNELS * cell, self.head_width, 3, padding=1)
        self.leave = nn.Conv3d(self.head_width, cell, 3, padding=1)
        initialise(self, self.blocks, self.mix, self.leave)

    def forward(self, fine: Tensor, thick: Tensor, below: Tensor, between: Tensor) -> Tensor:
        return self.decode(fine, self.encode(thick), below, between)

    def encode(self, thick: Tensor) -> Tensor:
        """(B, 2, K, H, W) to features (B, width, K, ceil(H / fold), ceil(W / fold))."""
        features: Tensor = self.blocks(self.enter(folded(self._whole(thick), self.config.fold)))
        return features

    def decode(self, fine: Tensor, features: Tensor, below: Tensor, between: Tensor) -> Tensor:
        """Refined slices (B, 1, D, H, W) from the thin grid's inputs and the features of the thick slices."""
        height, width = fine.shape[-2:]
        cells = folded(self._whole(fine), self.config.fold)
        mixed = self._mixed(features, below, between)
        change = self.leave(nn.functional.silu(self.head(torch.cat([nn.functional.silu(mixed), cells], 1))))
        out: Tensor = fine[:, COMPOSED : COMPOSED + 1] + unfolded(change, self.config.fold)[..., :height, :width]
        return out

    def _mixed(self, features: Tensor, below: Tensor, between: Tensor) -> Tensor:
        """Features at the thin slices: sum over both neighbours s and powers p of between^p W_sp features_s."""
        parts = torch.unflatten(self.mix(features), 1, (2 * (DEGREE + 1), self.head_width))
        # (B, D, parts x K) times (B, parts x K, channels x rows x columns).
        flat = parts.transpose(2, 3).flatten(3).flatten(1, 2).flatten(2)
        mixed = torch.bmm(selection(below, between, features, features.shape[2]), flat)
        return torch.unflatten(mixed, 2, (self.head_width, *features.shape[3:])).transpose(1, 2)

    def _whole(self, x: Tensor) -> Tensor:
        fold = self.config.fold
        return nn.functional.pad(x, (0, -x.shape[-1] % fold, 0, -x.shape[-2] % fold, 0, 0), mode="replicate")


def folded(x: Tensor, fold: int) -> Tensor:
    """(B, C, D, H, W) to (B, C fold^2, D, H / fold, W / fold): cells of pixels become channels."""
    return nn.functional.pixel_unshuffle(x.transpose(1, 2), fold).transpose(1, 2)


def unfolded(x: Tensor, fold: int) -> Tensor:
    """The inverse of `folded`."""
    return nn.functional.pixel_shuffle(x.transpose(1, 2), fold).transpose(1, 2)
