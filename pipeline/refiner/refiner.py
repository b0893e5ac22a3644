"""A trained refiner as a file, and its use: composed slices corrected in tiles, inside what the window can show.

The network is ``refiner_network``; what it sees, ``refiner_input``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from latentcache import InputError
from latentcache.storage import written_aside
from pipeline.forward_model import ThickMeasurement, stated_profile
from pipeline.refiner.inputs import RefinerInput, ThickView
from pipeline.refiner.network import HEAD_REACH, Refiner, RefinerConfig
from pipeline.refiner.pretrained import (
    PretrainedModel,
    RunSettings,
    load_pretrained,
    outside,
    shipped_weights,
    thin_slices,
)
from pipeline.volume import BLEND_SLOPE, Volume, Window, interpolated_onto

log = logging.getLogger("ctpipe.refiner")

FILE_NAME = "refiner.safetensors"
START_NAME = "start_refiner.safetensors"
"""In a diffusion run: the refiner whose slices the model starts from."""
TILE = 192
"""Pixels along the side of a tile; it holds all of its thick slices, and thin ones by SLICES at a time."""
SLICES = 32
SPACING_TOLERANCE = 1.25
"""Factor by which an output's slice spacing may be outside those that the network was trained on."""


@dataclass(frozen=True)
class RefinerCard:
    """Facts that the file holds beside the weights.

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

    A model that ships, or another with its card in a JSON file beside the weights, is one too: see ``pretrained``.
    ``optional``: nobody asked for it by name, so that series that it was not trained for go without it.
    """

    path: str
    sha256: str
    device: str = "cpu"
    optional: bool = False

    @classmethod
    def of(cls, path: str | Path, device: str = "cpu", *, optional: bool = False) -> RefinerFile:
        """The refiner of a run's folder, a file, or a model that ships, by its name.

        Raises:
            InputError: There is none.
        """
        file = (Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)).absolute()
        if not file.is_file():
            file = shipped_weights(str(path)) or file
        if not file.is_file():
            raise InputError(
                f"no {FILE_NAME} in the folder given as a refiner",
                expected="a run of `ctpipe train-refiner`, or the name of a model that `ctpipe models` lists",
                remedy="Give the run's folder, or train one: ctpipe train-refiner STORE RUN.",
            )
        return cls(str(file), hashlib.sha256(file.read_bytes()).hexdigest(), device, optional)

    @property
    def card_file(self) -> Path:
        """The card of a pretrained model; there is none beside a refiner that a run trained."""
        return Path(self.path).with_suffix(".json")

    @property
    def pretrained(self) -> PretrainedModel | None:
        """The pretrained model that it is; None for a refiner that a run trained."""
        return load_pretrained(self.path) if self.card_file.is_file() else None

    def copy_to(self, path: Path) -> None:
        """Copy the weights, after the card where there is one; what another refiner left there is replaced."""
        copy = replace(self, path=str(path))
        copy.card_file.unlink(missing_ok=True)
        for source, target in ((self.card_file, copy.card_file), (Path(self.path), path)):
            if source.is_file():
                with written_aside(target) as draft:
                    shutil.copyfile(source, draft)

    def load(self) -> tuple[Refiner, RefinerCard]:
        """The network on its device, and its card; kept for the process."""
        return _loaded(self)


def save_refiner(network: nn.Module, card: RefinerCard, out: Path) -> RefinerFile:
    """Write weights and card as safetensors, whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    with written_aside(out) as draft:
        save_file(tensors, draft, metadata={"refiner": json.dumps(asdict(card), sort_keys=True)})
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
    """Return what was found and what the refiner expects; None where it fits.

    It may have been trained for other latents, another slice spacing, or another way to compose.
    """
    low, high = card.spacing_mm
    if (window.center, window.width) != card.window:
        own = f"{window.center:g}:{window.width:g}"
        return f"a refiner for the window {card.window[0]:g}:{card.window[1]:g}", f"one for the latents' own, {own}"
    if not low / SPACING_TOLERANCE <= spacing_mm <= high * SPACING_TOLERANCE:
        return f"slices {spacing_mm:g} mm apart", f"the refiner's own spacing, {low:g} to {high:g} mm"
    if card.detail == "residual" and detail != "residual":
        return f"detail {detail}", "residual, as the refiner was trained"
    return None


def start_refiner(run: Path, sha256: str, device: str = "cpu") -> RefinerFile | None:
    """The refiner whose slices a run's model starts from; None where it starts from interpolated ones.

    Args:
        sha256: What the run's card says; empty for none.

    Raises:
        InputError: It is not in the run's folder, or another is.
    """
    if not sha256:
        return None
    path = run / START_NAME
    found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    if found != sha256:
        raise InputError(
            f"{START_NAME} of the run is " + (f"another refiner, {found[:12]}" if found else "not there"),
            expected=f"the refiner that the model was trained with, {sha256[:12]}",
            remedy=f"Copy its file into the run's folder as {START_NAME}.",
        )
    return RefinerFile(str(path), sha256, device)


def check_window(file: RefinerFile, window: Window) -> None:
    """Refuse a refiner that was trained for another window, or on a model's output.

    Raises:
        InputError: Its window differs, or it corrects what a model made.
    """
    if file.pretrained is not None:  # its scale has all of HU
        return
    _refuse_detail(file)
    own = file.load()[1].window
    if own != (window.center, window.width):
        raise InputError(
            f"a refiner for the window {own[0]:g}:{own[1]:g}",
            expected=f"one for the latents' own, {window.center:g}:{window.width:g}",
            remedy="Train one on latents of this window, or encode with the refiner's.",
        )


def _refuse_detail(file: RefinerFile) -> None:
    if (detail := file.load()[1].detail) != "none":
        raise InputError(
            f"a refiner of a model's output (detail {detail})",
            expected="one of plain interpolation, where refined slices are the model's condition",
            remedy="Train one with `ctpipe train-refiner STORE RUN` (no --checkpoint) or `ctpipe train-regression`.",
        )


def refined_volume(
    file: RefinerFile, thick: Volume, thin_z_mm: NDArray[np.float64], window: Window
) -> NDArray[np.float32]:
    """Return the thick series interpolated onto thin positions in mm and refined: (z, y, x) float32 HU.

    What a model that starts from refined slices sees, encoded, and what its change is added to. It depends on the pair
    alone: the slice profile is the one that the header states, never one fitted on other patients.

    Raises:
        InputError: The refiner was trained on a model's output, or for another window or slice spacing.
    """
    if (model := file.pretrained) is not None:
        return _by_pretrained(model, thick, thin_z_mm, file.device)
    _refuse_detail(file)
    out = interpolated_onto(thick, thin_z_mm, "cubic")
    refine(file, out, ThickMeasurement.of(thick, thin_z_mm, noise_hu=0.0), window, "none")
    return out


def _by_pretrained(
    model: PretrainedModel, thick: Volume, thin_z_mm: NDArray[np.float64], device: str
) -> NDArray[np.float32]:
    """Return thin slices in float32, so that what is encoded and what it is added to are one volume on any machine."""
    target = thick.geometry.with_z(thin_z_mm)
    if found := outside(model.card, thick.geometry, target):
        log.warning("refined beyond what the card of the model %s states: %s", model.name, "; ".join(found))
    return thin_slices(model, thick, target, stated_profile(thick), RunSettings(device, "float32"))


@torch.no_grad()
def refine(
    file: RefinerFile,
    composed: NDArray[np.float32],
    measured: ThickMeasurement,
    window: Window,
    detail: str,
    tile: int = TILE,
) -> float:
    """Refine ``composed`` (z, y, x) float32 HU in place; returns the RMS change in HU.

    Only what the window can show takes part: a voxel beyond the window keeps its value unless the network brings it
    well inside (see ``settle``). Tiles start at whole folds, so that they give the numbers of one pass.

    Raises:
        InputError: The refiner was trained for another window or slice spacing.
    """
    network, card = file.load()
    if (wrong := misfit(card, window, measured.spacing_mm, detail)) is not None:
        raise InputError(wrong[0], expected=wrong[1], remedy="Leave --refiner away, or train one on such series.")
    view = ThickView.of(measured.thick_z_mm, measured.thin_z_mm, measured.profile)
    fold, reach = card.config.fold, card.config.reach
    side = max(fold, tile // fold * fold)
    # Tiles read their neighbours' halo as it was before.
    before = composed.copy()
    total = 0.0
    for plane in tiles(composed.shape[1:], (side, side)):
        wide, inner = with_halo(plane, composed.shape[1:], (reach, reach))
        given = view.inputs(measured.hu[:, *wide], before[:, *wide], window)
        for depth, unit in _refined_slices(network, given, file.device):
            place = (depth, *plane)
            settled = settle(window.from_unit(unit[:, *inner]), composed[place], window)
            total += float(np.square(settled - composed[place], dtype=np.float64).sum())
            composed[place] = settled
    return float(np.sqrt(total / composed.size))


def _refined_slices(network: Refiner, given: RefinerInput, device: str) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Refined thin slices of one tile, a few at a time, in unit scale; the thick grid is looked at once."""
    features = network.encode(torch.from_numpy(given.thick)[None].to(device))
    count = given.fine.shape[1]
    for (depth,) in tiles((count,), (SLICES,)):
        (wide,), (inner,) = with_halo((depth,), (count,), (HEAD_REACH,))
        below = given.below[wide]
        first, last = int(below.min()), int(below.max())
        unit = network.decode(
            torch.from_numpy(np.ascontiguousarray(given.fine[:, wide]))[None].to(device),
            features[:, :, first : last + 2],
            torch.from_numpy(below - first)[None].to(device),
            torch.from_numpy(given.between[wide])[None].to(device),
        )
        yield depth, unit[0, 0, inner].clamp(-1, 1).cpu().numpy()


def settle(refined: NDArray[np.float32], composed: NDArray[np.float32], window: Window) -> NDArray[np.float32]:
    """Refined HU, inside the window, where composed HU is inside too; else blended with it, without a step.

    For composed HU beyond an edge, the weight of the refined value rises from 0 at that edge to 1 at a distance that
    grows with how far beyond it is, as in ``volume.blend_at_edges``: salt in the lung needs more than a few HU of
    belief.
    """
    out = np.array(refined, dtype=np.float32)
    for edge, sign in ((window.lower, 1.0), (window.upper, -1.0)):
        beyond = sign * (composed - np.float32(edge)) < 0
        value = composed[beyond]
        margin = np.float32(BLEND_SLOPE) * np.abs(value - np.float32(edge))
        t = np.clip(sign * (refined[beyond] - np.float32(edge)) / np.maximum(margin, np.float32(1e-3)), 0.0, 1.0)
        out[beyond] = value + t * t * (3.0 - 2.0 * t) * (refined[beyond] - value)
    return out


Box = tuple[slice, ...]


def tiles(shape: tuple[int, ...], tile: tuple[int, ...]) -> list[Box]:
    """Boxes of at most ``tile`` that cover ``shape`` without overlap."""
    axes = [[slice(a, min(a + t, n)) for a in range(0, n, t)] for n, t in zip(shape, tile, strict=True)]
    return list(itertools.product(*axes))


def with_halo(tile: Box, shape: tuple[int, ...], halo: tuple[int, ...]) -> tuple[Box, Box]:
    """The tile widened by ``halo`` along each axis inside ``shape``, and where the tile is in that."""
    wide = tuple(slice(max(0, s.start - h), min(n, s.stop + h)) for s, n, h in zip(tile, shape, halo, strict=True))
    inner = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(tile, wide, strict=True))
    return wide, inner
