"""The shipped refiner's network: nearly isotropic cells on the thick slices' grid, a small head on the thin slices'.

As in ``refiner_network`` nearly all arithmetic happens on the thick grid, and each thin slice mixes the features of its
two thick neighbours. Two things make it learn from genuine CT, where that network gained 0.1 dB in 2,500 steps:

- It works on cells of about the size that thick slices are apart. Pixels measure 0.4 to 2.4 mm and thick slices lie 3
  to 7.5 mm apart: on a grid of pixels, an edge that runs obliquely through two slices moves by ten pixels from one to
  the next, and kernels of three pixels cannot bring it together. Cells of 4 x 4 fine pixels, or 2 x 2 coarse ones,
  measure 1.8 to 4.8 mm. A coarse pixel enters as 2 x 2 equal fine ones, so that there is one set of weights.
- It sees contrasts beside levels. Tissues differ by 0.05 on a scale on which air is at -1, so that every activation
  works in its linear part; but what is linear the linear estimate has already, and the gradient is all noise.

Shapes: B batch, D thin and K thick slices, H rows, W columns of cells; units are those of ``UnitScale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentcache import InputError
from pipeline.refiner.network import DEGREE, HEAD_REACH, ResidualBlock, folded, initialise, selection, unfolded

FOLD = 4
"""Pixels along a cell's side."""
COARSE_PIXEL_MM = 1.15
"""From this pixel size on a cell holds 2 x 2 pixels."""
THICK_FACTS, THIN_FACTS = 2, 2
"""Constant channels: profile width and cell size, in thick spacings; thin spacing and phase, likewise."""
GAIN = 5.0
"""Of contrasts as the network sees them."""
RESIDUAL_UNIT = 0.1
"""Change that the network's output of 1 adds, in units of the scale: about the RMS of what is to be learnt."""


@dataclass(frozen=True)
class NetworkConfig:
    """Size of the network: ``width`` channels on the thick grid, ``head`` on the thin one."""

    width: int = 64
    blocks: int = 6
    head: int = 32

    def __post_init__(self) -> None:
        if min(self.width, self.head) < 1 or self.blocks < 0:
            raise InputError(
                f"a network of width {self.width}, {self.blocks} blocks and a head of {self.head}",
                expected="widths of at least 1 and blocks of at least 0",
                remedy="For example --width 64 --blocks 6 --head 32.",
            )

    @property
    def reach(self) -> int:
        """Return how many cells, or thick slices, away an output depends on its input."""
        return 2 * self.blocks + 1 + HEAD_REACH


activation = nn.functional.silu


def fold_of(pixel_mm: float) -> int:
    """Pixels along a cell's side at this pixel size."""
    return FOLD if pixel_mm < COARSE_PIXEL_MM else FOLD // 2


class PretrainedNetwork(nn.Module):
    """Cells of thick slices, cells of linearly estimated thin slices, to refined thin slices."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.enter = nn.Conv3d(1 + 3 * FOLD**2 + THICK_FACTS, config.width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(config.width) for _ in range(config.blocks)))
        self.mix = nn.Conv3d(config.width, 2 * (DEGREE + 1) * config.head, 1)
        self.head = nn.Conv3d(config.head + 1 + FOLD**2 + THIN_FACTS, config.head, 3, padding=1)
        self.leave = nn.Conv3d(config.head, FOLD**2, 3, padding=1)
        initialise(self, self.blocks, self.mix, self.leave)

    def channels_last(self) -> PretrainedNetwork:
        """This network with its weights laid out as CPUs and bfloat16 want them: up to twice as fast."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        return self

    def forward(
        self, thick: Tensor, facts: Tensor, linear: Tensor, thin_facts: Tensor, below: Tensor, between: Tensor
    ) -> Tensor:
        """Refined thin slices from pixels.

        Args:
            thick: (B, 1, K, rows, columns) unit scale; rows and columns are whole cells.
            facts: (B, THICK_FACTS).
            linear: (B, 1, D, rows, columns) the linear estimate.
            thin_facts: (B, THIN_FACTS, D).
            below, between: (B, D) the thick slice below each thin one, and where between it and the next it is.
        """
        return self.decode(self.encode(thick, facts), linear, thin_facts, below, between)

    def encode(self, thick: Tensor, facts: Tensor, fold: int = FOLD) -> Tensor:
        """(B, 1, K, rows, columns) to features (B, width, K, H, W)."""
        cells = contrasts(as_cells(thick, fold))
        told = facts[:, :, None, None, None].to(cells.dtype).expand(-1, -1, *cells.shape[2:])
        features: Tensor = self.blocks(self.enter(_last(torch.cat([cells, told], 1))))
        return features

    def decode(
        self, features: Tensor, linear: Tensor, thin_facts: Tensor, below: Tensor, between: Tensor, fold: int = FOLD
    ) -> Tensor:
        """Refined slices (B, 1, D, rows, columns)."""
        change = self.leave(self.at_thin(features, linear, thin_facts, below, between, fold))
        return linear + RESIDUAL_UNIT * as_pixels(change, fold).to(linear.dtype)

    def at_thin(
        self, features: Tensor, linear: Tensor, thin_facts: Tensor, below: Tensor, between: Tensor, fold: int = FOLD
    ) -> Tensor:
        """Return the input of the last layer: (B, head, D, H, W)."""
        cells = as_cells(linear, fold)
        told = thin_facts[..., None, None].to(cells.dtype).expand(-1, -1, -1, *cells.shape[3:])
        mixed = activation(self._mixed(features, below, between))
        mean = cells.mean(1, keepdim=True)
        cells = torch.cat([(cells - mean) * GAIN, mean], 1)
        seen = _last(torch.cat([mixed, cells.to(mixed.dtype), told.to(mixed.dtype)], 1))
        out: Tensor = activation(self.head(seen))
        return out

    def _mixed(self, features: Tensor, below: Tensor, between: Tensor) -> Tensor:
        """Features at the thin slices: sum over both neighbours s and powers p of between^p W_sp features_s."""
        batch, _, count = features.shape[:3]
        head = self.config.head
        parts = torch.unflatten(self.mix(features), 1, (2 * (DEGREE + 1), head))
        select = selection(below, between, parts, count)
        # (B, D, parts x K) times (B, parts x K, H x W x channels): channels last, as the convolutions want them.
        flat = parts.permute(0, 1, 3, 4, 5, 2).reshape(batch, select.shape[2], -1)
        mixed = torch.bmm(select, flat)
        return mixed.view(batch, -1, *features.shape[3:], head).permute(0, 4, 1, 2, 3)


def contrasts(cells: Tensor) -> Tensor:
    """Map (B, C, K, H, W) to its mean over C, and GAIN times C less that and the steps to both neighbours.

    Tissues differ by 0.05 on a scale on which air is at -1: without this a network sees the level alone at first, all
    its activations work in their linear part, and it learns nothing for a long time.
    """
    mean = cells.mean(1, keepdim=True)
    steps = torch.diff(cells, dim=2)
    above, below = nn.functional.pad(steps, (0, 0, 0, 0, 0, 1)), nn.functional.pad(steps, (0, 0, 0, 0, 1, 0))
    return torch.cat([mean, (cells - mean) * GAIN, above * GAIN, below * GAIN], 1)


def as_cells(pixels: Tensor, fold: int) -> Tensor:
    """(B, 1, D, rows, columns) to (B, FOLD^2, D, H, W); a coarse pixel is repeated as 2 x 2 fine ones."""
    cells = folded(pixels, fold)
    return cells if fold == FOLD else cells[:, _coarse(fold, cells.device)]


def as_pixels(cells: Tensor, fold: int) -> Tensor:
    """The inverse of `as_cells`; the mean of the fine pixels of a coarse one."""
    if fold != FOLD:
        share = (fold / FOLD) ** 2
        mean = cells.new_zeros(cells.shape[0], fold**2, *cells.shape[2:])
        cells = mean.index_add_(1, _coarse(fold, cells.device), cells) * share
    return unfolded(cells, fold)


def _coarse(fold: int, device: torch.device) -> Tensor:
    """Channel of the coarse cell that each of a cell's fine pixels is in."""
    at = torch.arange(FOLD, device=device) * fold // FOLD
    return (at[:, None] * fold + at[None, :]).flatten()


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
