"""The refiner: a small 3-D residual network from what was measured and composed to thin slices, in unit scale.

It sees pixels, so it can pass the autoencoder's ceiling; it has no normalisation and only local convolutions, so that a
volume of any size in tiles gives the numbers of one pass. Its last layer starts at zero: untrained, it changes nothing.
It works on cells of ``fold`` x ``fold`` pixels as channels (pixel unshuffle: Shi et al. 2016, section 3.2, reversed):
a quarter of the places at twice the channels costs the same, sees twice as far in-plane, and learns more.

Shapes: B batch, D depth, H rows, W columns; unit scale is the window's, [-1, 1], clipped. What the three input channels
are stands in ``refiner_input``.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentcache.errors import InputError
from pipeline.compose import HANDOVER_SLOPE
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.refiner_input import CHANNELS, COMPOSED, ThickView
from pipeline.slice_profile import SliceProfile
from pipeline.volume import Volume

FILE_NAME = "refiner.safetensors"
TILE_ZYX = (64, 160, 160)
SPACING_TOLERANCE = 1.25
"""How far, as a factor, an output's slice spacing may lie outside those that the network was trained on."""


@dataclass(frozen=True)
class RefinerConfig:
    """Size of the network: 3 blocks reach 8 slices along z (8 mm at 1 mm) and, on folds of 2, 16 pixels in-plane."""

    width: int = 32
    blocks: int = 3
    fold: int = 2

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 0 or self.fold < 1:
            raise InputError(
                f"a refiner of width {self.width}, {self.blocks} blocks and folds of {self.fold}",
                expected="a width and a fold of at least 1, and blocks of at least 0",
                remedy="For example --width 32 --blocks 3.",
            )

    @property
    def radius_zyx(self) -> tuple[int, int, int]:
        """How many voxels away an output still depends on its input; in-plane a whole number of folds."""
        reach = 2 * self.blocks + 2
        return reach, reach * self.fold, reach * self.fold


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)
        # Without normalisation a deep chain of random blocks diverges early: each begins as the identity.
        nn.init.zeros_(self.conv2.weight)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.conv2(nn.functional.silu(self.conv1(h)))
        return out


class Refiner(nn.Module):
    """(B, 3, D, H, W) [linear estimate, composed, phase] to (B, 1, D, H, W), in unit scale; any H and W."""

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__()
        self.config = config
        cell = config.fold**2
        self.enter = nn.Conv3d(CHANNELS * cell, config.width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(config.width) for _ in range(config.blocks)))
        self.leave = nn.Conv3d(config.width, cell, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        fold = self.config.fold
        whole = nn.functional.pad(x, (0, -width % fold, 0, -height % fold, 0, 0), mode="replicate")
        change = self.leave(nn.functional.silu(self.blocks(self.enter(folded(whole, fold)))))
        out: Tensor = x[:, COMPOSED : COMPOSED + 1] + unfolded(change, fold)[..., :height, :width]
        return out


def folded(x: Tensor, fold: int) -> Tensor:
    """(B, C, D, H, W) to (B, C fold^2, D, H / fold, W / fold): cells of pixels become channels."""
    return nn.functional.pixel_unshuffle(x.transpose(1, 2), fold).transpose(1, 2)


def unfolded(x: Tensor, fold: int) -> Tensor:
    """The inverse of `folded`."""
    return nn.functional.pixel_shuffle(x.transpose(1, 2), fold).transpose(1, 2)


@dataclass(frozen=True)
class RefinerCard:
    """What stands in the file beside the weights.

    Attributes:
        window: (centre, width) in HU of its unit scale.
        spacing_mm: Least and largest slice spacing of the thin series it learnt from.
        detail: How the composed input was made in training: ``residual``, or ``none`` where it was the interpolation.
        recipe: The rest of how it was trained; JSON-ready, keys and figures only.
    """

    config: RefinerConfig
    window: tuple[float, float]
    spacing_mm: tuple[float, float]
    detail: str
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RefinerFile:
    """A trained refiner by path and content, as settings carry it; the hash covers weights and card alike.

    ``optional``: nobody asked for it by name, so that series that it was not trained for go without it.
    """

    path: str
    sha256: str
    device: str = "cpu"
    optional: bool = False

    @classmethod
    def of(cls, path: str | Path, device: str = "cpu", *, optional: bool = False) -> RefinerFile:
        """The refiner of a run's folder, or a file.

        Raises:
            InputError: There is none.
        """
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise InputError(
                f"no {FILE_NAME} in the folder given as a refiner",
                expected="a run of `ctpipe train-refiner`",
                remedy="Give the run's folder, or train one: ctpipe train-refiner STORE RUN.",
            )
        return cls(str(file), hashlib.sha256(file.read_bytes()).hexdigest(), device, optional)

    def load(self) -> tuple[Refiner, RefinerCard]:
        """The network on its device, and its card; kept for the process."""
        return _loaded(self)


def save_refiner(network: Refiner, card: RefinerCard, out: Path) -> RefinerFile:
    """Write weights and card as safetensors, aside and renamed."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(".partial")
    save_file(tensors, aside, metadata={"refiner": json.dumps(asdict(card), sort_keys=True)})
    aside.replace(out)
    return RefinerFile.of(out)


@functools.lru_cache(maxsize=4)
def _loaded(file: RefinerFile) -> tuple[Refiner, RefinerCard]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file.path, "pt") as opened:
            raw = json.loads((opened.metadata() or {})["refiner"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        card = RefinerCard(
            RefinerConfig(**raw["config"]),
            (float(raw["window"][0]), float(raw["window"][1])),
            (float(raw["spacing_mm"][0]), float(raw["spacing_mm"][1])),
            str(raw["detail"]),
            raw["recipe"],
        )
        network = Refiner(card.config)
        network.load_state_dict(tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        raise InputError(
            "a file that holds no refiner",
            expected=f"the {FILE_NAME} that `ctpipe train-refiner` wrote",
            remedy="Give --refiner the run's folder.",
        ) from None
    return network.requires_grad_(False).eval().to(file.device), card


def misfit(card: RefinerCard, window: Window, spacing_mm: float, detail: str) -> tuple[str, str] | None:
    """What was found and what the refiner expects, where it was trained for other latents, another slice spacing, or
    another way to compose; None where it fits."""
    low, high = card.spacing_mm
    if (window.center, window.width) != card.window:
        own = f"{window.center:g}:{window.width:g}"
        return f"a refiner for the window {card.window[0]:g}:{card.window[1]:g}", f"one for the latents' own, {own}"
    if not low / SPACING_TOLERANCE <= spacing_mm <= high * SPACING_TOLERANCE:
        return f"slices {spacing_mm:g} mm apart", f"the refiner's own spacing, {low:g} to {high:g} mm"
    if card.detail == "residual" and detail != "residual":
        return f"detail {detail}", "residual, as the refiner was trained"
    return None


@torch.no_grad()
def refine(
    file: RefinerFile,
    composed: NDArray[np.float32],
    thick: Volume,
    target: Geometry,
    profile: SliceProfile,
    window: Window,
    detail: str,
    tile_zyx: tuple[int, int, int] = TILE_ZYX,
) -> float:
    """Refine ``composed`` (z, y, x) float32 HU on ``target`` in place; returns the RMS change in HU.

    Only what the window can show takes part: a voxel beyond the window keeps its value unless the network brings it
    well inside (see ``settle``). Tiles start at whole folds, so that they give the numbers of one pass.

    Raises:
        InputError: The refiner was trained for another window or slice spacing.
    """
    network, card = file.load()
    if (wrong := misfit(card, window, target.spacing_mm_zyx[0], detail)) is not None:
        raise InputError(wrong[0], expected=wrong[1], remedy="Leave --refiner away, or train one on such series.")
    view = ThickView.of(np.asarray(thick.geometry.z_mm), np.asarray(target.z_mm), profile)
    fold = card.config.fold
    step = (tile_zyx[0], *(max(fold, n // fold * fold) for n in tile_zyx[1:]))
    # Tiles read their neighbours' halo as it was before.
    before = window.to_unit(composed)
    total = 0.0
    for tile in tiles(composed.shape, step):
        wide, inner = with_halo(tile, composed.shape, card.config.radius_zyx)
        given = view.inputs(thick.hu[:, wide[1], wide[2]], wide[0], before[wide], window)[None]
        unit = network(torch.from_numpy(given).to(file.device))[0, 0].clamp(-1, 1).cpu().numpy()[inner]
        settled = settle(window.from_unit(unit), composed[tile], window)
        total += float(np.square(settled - composed[tile], dtype=np.float64).sum())
        composed[tile] = settled
    return float(np.sqrt(total / composed.size))


def settle(refined: NDArray[np.float32], composed: NDArray[np.float32], window: Window) -> NDArray[np.float32]:
    """Refined HU, inside the window, where composed HU is inside too; else blended with it, without a step.

    For composed HU beyond an edge, the weight of the refined value rises from 0 at that edge to 1 at a distance that
    grows with how far beyond it lies, as in ``compose.hand_over``: salt in the lung needs more than a few HU of belief.
    """
    out = np.array(refined, dtype=np.float32)
    for edge, sign in ((window.lower, 1.0), (window.upper, -1.0)):
        beyond = sign * (composed - np.float32(edge)) < 0
        value = composed[beyond]
        margin = np.float32(HANDOVER_SLOPE) * np.abs(value - np.float32(edge))
        t = np.clip(sign * (refined[beyond] - np.float32(edge)) / np.maximum(margin, np.float32(1e-3)), 0.0, 1.0)
        out[beyond] = value + t * t * (3.0 - 2.0 * t) * (refined[beyond] - value)
    return out


Box = tuple[slice, ...]


def tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> list[Box]:
    """Boxes of at most ``tile`` that cover ``shape`` without overlap."""
    axes = [[slice(a, min(a + t, n)) for a in range(0, n, t)] for n, t in zip(shape, tile, strict=True)]
    return [(z, y, x) for z in axes[0] for y in axes[1] for x in axes[2]]


def with_halo(tile: Box, shape: tuple[int, ...], halo: tuple[int, ...]) -> tuple[Box, Box]:
    """The tile widened by ``halo`` along each axis inside ``shape``, and where the tile lies in that."""
    wide = tuple(slice(max(0, s.start - h), min(n, s.stop + h)) for s, n, h in zip(tile, shape, halo, strict=True))
    inner = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(tile, wide, strict=True))
    return wide, inner
