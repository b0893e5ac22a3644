"""The refiner: a small 3-D residual network from [interpolated thick, composed thin] to thin slices, in unit scale.

It sees pixels, so it can pass the autoencoder's ceiling; it has no normalisation and only local convolutions, so that a
volume of any size in tiles gives the numbers of one pass. Its last layer starts at zero: untrained, it changes nothing.

Shapes: B batch, D depth, H rows, W columns; unit scale is the window's, [-1, 1], clipped.
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
from pipeline.hu import Window

FILE_NAME = "refiner.safetensors"
TILE_ZYX = (64, 160, 160)
SPACING_TOLERANCE = 1.25
"""How far, as a factor, an output's slice spacing may lie outside those that the network was trained on."""


@dataclass(frozen=True)
class RefinerConfig:
    """Size of the network: 16 channels and 3 blocks reach 8 voxels around each one (8 mm at 1 mm slices)."""

    width: int = 16
    blocks: int = 3

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 0:
            raise InputError(
                f"a refiner of width {self.width} and {self.blocks} blocks",
                expected="a width of at least 1 and blocks of at least 0",
                remedy="For example --width 16 --blocks 3.",
            )

    @property
    def radius(self) -> int:
        """How many voxels away, along each axis, an output still depends on its input."""
        return 2 * self.blocks + 2


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(width, width, 3, padding=1)
        self.conv2 = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.conv2(nn.functional.silu(self.conv1(h)))
        return out


class Refiner(nn.Module):
    """(B, 2, D, H, W) [interpolated thick, composed] to (B, 1, D, H, W), both in unit scale."""

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__()
        self.config = config
        self.enter = nn.Conv3d(2, config.width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(config.width) for _ in range(config.blocks)))
        self.leave = nn.Conv3d(config.width, 1, 3, padding=1)
        nn.init.zeros_(self.leave.weight)
        assert self.leave.bias is not None
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x[:, 1:] + self.leave(nn.functional.silu(self.blocks(self.enter(x))))
        return out


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
    """A trained refiner by path and content, as settings carry it; the hash covers weights and card alike."""

    path: str
    sha256: str
    device: str = "cpu"

    @classmethod
    def of(cls, path: str | Path, device: str = "cpu") -> RefinerFile:
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
        return cls(str(file), hashlib.sha256(file.read_bytes()).hexdigest(), device)

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


def check_fits(card: RefinerCard, window: Window, spacing_mm: float, detail: str) -> None:
    """Refuse a refiner trained for other latents, another slice spacing, or another way to compose."""
    low, high = card.spacing_mm
    if (window.center, window.width) != card.window:
        found, expected = (
            f"a refiner for the window {card.window[0]:g}:{card.window[1]:g}",
            (f"one for the latents' own, {window.center:g}:{window.width:g}"),
        )
    elif not low / SPACING_TOLERANCE <= spacing_mm <= high * SPACING_TOLERANCE:
        found, expected = f"slices {spacing_mm:g} mm apart", f"the refiner's own spacing, {low:g} to {high:g} mm"
    elif card.detail == "residual" and detail != "residual":
        found, expected = f"detail {detail}", "residual, as the refiner was trained"
    else:
        return
    raise InputError(found, expected=expected, remedy="Leave --refiner away, or train one on such series.")


@torch.no_grad()
def refine(
    file: RefinerFile,
    base: NDArray[np.float32],
    composed: NDArray[np.float32],
    window: Window,
    spacing_mm: float,
    detail: str,
    tile_zyx: tuple[int, int, int] = TILE_ZYX,
) -> float:
    """Refine ``composed`` (z, y, x) float32 HU in place, given interpolated thick HU; returns the RMS change in HU.

    Only what the window can show takes part: a voxel beyond the window keeps its value unless the network brings it
    well inside (see ``settle``).

    Raises:
        InputError: The refiner was trained for another window or slice spacing.
    """
    network, card = file.load()
    check_fits(card, window, spacing_mm, detail)
    # Tiles read their neighbours' halo as it was before.
    before = window.to_unit(composed)
    total = 0.0
    for tile in tiles(composed.shape, tile_zyx):
        wide, inner = with_halo(tile, composed.shape, card.config.radius)
        pair = np.stack([window.to_unit(base[wide]), before[wide]])[None]
        unit = network(torch.from_numpy(pair).to(file.device))[0, 0].clamp(-1, 1).cpu().numpy()[inner]
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


def with_halo(tile: Box, shape: tuple[int, ...], halo: int) -> tuple[Box, Box]:
    """The tile widened by ``halo`` inside ``shape``, and where the tile lies in that."""
    wide = tuple(slice(max(0, s.start - halo), min(n, s.stop + halo)) for s, n in zip(tile, shape, strict=True))
    inner = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(tile, wide, strict=True))
    return wide, inner
