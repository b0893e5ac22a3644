"""The refiner that ships: thick slices in, thin ones out, by weights in the package; no training, no network access.

    model = load_pretrained("default")          # or "fast", or the path of a .safetensors file
    hu = thin_slices(model, thick, thick.geometry.thin_grid(1.0), profile)

It needs neither an autoencoder nor a diffusion run. What it gives is the mean of what the thick slices allow, not yet
made consistent with them: ``pipeline.forward_model.enforce_data_consistency`` does that. Weights are in
``pipeline/refiner/weights`` as float16, each with its card beside it as JSON: what it was trained on, for what it was
trained, the figures it reached.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.forward_model import SliceProfile
from pipeline.refiner.inputs import neighbours
from pipeline.refiner.network import HEAD_REACH
from pipeline.refiner.pretrained_input import facts_of, from_unit, linear_weights, to_unit
from pipeline.refiner.pretrained_network import NetworkConfig, PretrainedNetwork, fold_of
from pipeline.volume import Geometry, Volume

FOLDER = Path(__file__).parent / "weights"
PREFIX = "refiner_"
DEFAULT = "default"
MAX_CELLS = 1_100_000
"""Cells of the thick grid worked on at once: 0.14 GB for each activation of 64 channels in bfloat16."""
SLICES = 32
"""Thin slices at a time."""
TOLERANCE = 1.1
"""Factor by which a series may be outside what the card states before that is reported."""


T = TypeVar("T")
Arithmetic = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Range:
    """Least and largest of what a model was trained for."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low / TOLERANCE <= value <= self.high * TOLERANCE


@dataclass(frozen=True)
class PretrainedCard:
    """A model's card, as it is in JSON beside the weights.

    Attributes:
        name: By which it is chosen.
        weights_sha256: Of the file of weights.
        network: Size of the network.
        thickness_mm, spacing_mm, pixel_mm: Of thick series it was trained for; thin_spacing_mm of its output.
        data: Genuine scans that it learnt from: name, sha256, licence, credit.
        recipe: How it was trained; held_out: figures on patients that it did not learn from.
        raw: The whole card, for display.
    """

    name: str
    weights_sha256: str
    network: NetworkConfig
    thickness_mm: Range
    spacing_mm: Range
    pixel_mm: Range
    thin_spacing_mm: Range
    data: tuple[Mapping[str, Any], ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict)
    held_out: Mapping[str, Any] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> PretrainedCard:
        """From parsed JSON; KeyError, TypeError or ValueError where it is no card."""
        ranges = {k: Range(*(float(v) for v in raw["trained_for"][k])) for k in RANGES}
        return cls(
            str(raw["name"]),
            str(raw["weights_sha256"]),
            NetworkConfig(**raw["network"]),
            **ranges,
            data=tuple(raw.get("data", ())),
            recipe=raw.get("recipe", {}),
            held_out=raw.get("held_out", {}),
            raw=raw,
        )


RANGES = ("thickness_mm", "spacing_mm", "pixel_mm", "thin_spacing_mm")


@dataclass(frozen=True)
class PretrainedModel:
    """Weights by path and content, as settings carry them, and their card."""

    path: str
    card: PretrainedCard

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def sha256(self) -> str:
        return self.card.weights_sha256

    def network(self, device: str = "cpu") -> PretrainedNetwork:
        """The network on a device, ready to be used; kept for the process."""
        return _network(self.path, self.sha256, self.card.network, device)


@dataclass(frozen=True)
class RunSettings:
    """Settings of `thin_slices`.

    Attributes:
        device: A torch device.
        arithmetic: ``auto`` takes bfloat16 where the processor has it in hardware: twice as fast, within 1 HU.
        threads: Of a CPU; None leaves torch's own.
        max_cells: Cells of the thick grid at once; less needs less memory and more time.
        on_progress: Called with the share that is done, 0 to 1.
    """

    device: str = "cpu"
    arithmetic: Arithmetic = "auto"
    threads: int | None = None
    max_cells: int = MAX_CELLS
    on_progress: Callable[[float], None] | None = None


def shipped_models() -> list[PretrainedModel]:
    """The models in the package, the default one first."""
    found = [load_pretrained(path) for path in sorted(FOLDER.glob(f"{PREFIX}*.safetensors"))]
    return sorted(found, key=lambda model: (model.name != DEFAULT, model.name))


def shipped_weights(name: str) -> Path | None:
    """The weights of a model in the package by its name; None where none bears it."""
    path = FOLDER / f"{PREFIX}{name}.safetensors"
    return path if path.is_file() else None


def load_pretrained(spec: str | Path = DEFAULT) -> PretrainedModel:
    """A model by name or by the path of its weights.

    Raises:
        InputError: There is no such model, its card is missing or is none, or the weights are not those of its card.
    """
    path = shipped_weights(str(spec)) or Path(spec)
    if not path.is_file() or path.suffix != ".safetensors":
        names = [p.stem.removeprefix(PREFIX) for p in sorted(FOLDER.glob(f"{PREFIX}*.safetensors"))]
        raise InputError(
            f"no model {str(spec)!r}",
            expected=f"{', '.join(names)}, or the path of a .safetensors file with its card beside it",
            remedy="`ctpipe models` lists what there is.",
        )
    try:
        card = PretrainedCard.of(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, KeyError, TypeError, ValueError):
        raise InputError(
            f"{path.name} without a card",
            expected=f"{path.stem}.json beside it, as infra/train_pretrained.py writes it",
            remedy="Put the card there, or choose another model.",
        ) from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != card.weights_sha256:
        raise InputError(
            f"{path.name} with sha256 {digest[:12]}",
            expected=f"{card.weights_sha256[:12]}, as its card states",
            remedy="Take weights and card of one training, or install the package anew.",
        )
    return PretrainedModel(str(path), card)


@functools.lru_cache(maxsize=4)
def _network(path: str, sha256: str, config: NetworkConfig, device: str) -> PretrainedNetwork:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = PretrainedNetwork(config)
    try:
        network.load_state_dict({name: t.float() for name, t in load_file(path).items()})
    except (SafetensorError, RuntimeError):
        raise InputError(
            f"{Path(path).name} does not hold the network of its card",
            expected=f"width {config.width}, {config.blocks} blocks, head {config.head}",
            remedy="Take weights and card of one training.",
        ) from None
    return network.requires_grad_(False).eval().channels_last().to(device)


def outside(card: PretrainedCard, thick: Geometry, target: Geometry) -> list[str]:
    """In words, whatever about a series and the wanted slices is outside what the model was trained for."""
    spacing, *pixel = thick.spacing_mm_zyx
    measured = {
        "thickness_mm": (thick.thickness_mm or spacing, "slice thickness"),
        "spacing_mm": (spacing, "slice spacing"),
        "pixel_mm": (max(pixel), "pixel size"),
        "thin_spacing_mm": (target.spacing_mm_zyx[0], "wanted slice spacing"),
    }
    return [
        f"{name} {value:.3g} mm, trained for {known.low:g} to {known.high:g} mm"
        for key, (value, name) in measured.items()
        if not (known := getattr(card, key)).holds(value)
    ]


def thin_slices(
    model: PretrainedModel,
    thick: Volume,
    target: Geometry,
    profile: SliceProfile,
    settings: RunSettings | None = None,
) -> NDArray[np.float32]:
    """Thin slices (z, y, x) float32 HU at ``target`` from a thick series on the same in-plane grid.

    Args:
        profile: What the thick slices are thought to average.

    Raises:
        InputError: Fewer than two thick slices, or another in-plane grid.
    """
    if len(thick.hu) < 2 or thick.hu.shape[1:] != target.shape_zyx[1:]:
        raise InputError(
            f"thick slices {thick.hu.shape} for thin ones {target.shape_zyx}",
            expected="two slices or more, and one in-plane grid",
            remedy="Give a whole series, and its own grid at another slice spacing.",
        )
    how = settings or RunSettings()
    return flushed(lambda: _thin_slices(model, thick, target, profile, how), how.threads)


def flushed(work: Callable[[], T], threads: int | None = None) -> T:
    """Do ``work`` with denormal numbers flushed to zero on every thread that torch computes on, and return its result.

    Denormals slow a CPU's convolutions down by five times and more, and they arise wherever air is exactly zero. The
    switch is one thread's own, and torch's pool keeps what it was made with; so the work is done on a new thread, whose
    pool is made after the switch was thrown. The caller's thread stays as it was.
    """

    def prepare() -> None:
        torch.set_flush_denormal(True)
        torch.set_num_threads(threads or torch.get_num_threads())

    with ThreadPoolExecutor(1, "flushed-denormals", prepare) as pool:
        return pool.submit(work).result()


def native_bfloat16(device: str) -> bool:
    """Whether the device computes bfloat16 in hardware."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in tests)


@torch.no_grad()
def _thin_slices(
    model: PretrainedModel, thick: Volume, target: Geometry, profile: SliceProfile, settings: RunSettings
) -> NDArray[np.float32]:
    network = model.network(settings.device)
    view = _View.of(thick.geometry, target, profile)
    out = np.empty((len(view.linear), *thick.hu.shape[1:]), np.float32)
    reach = model.card.network.reach
    half = settings.arithmetic == "bfloat16" or (settings.arithmetic == "auto" and native_bfloat16(settings.device))
    slabs = list(row_slabs(thick.hu.shape, view.fold, reach, settings.max_cells))
    for number, (wide, inner) in enumerate(slabs):
        padded, rows, columns = _whole_cells(thick.hu[:, wide], view.fold)
        with torch.autocast(torch.device(settings.device).type, torch.bfloat16, enabled=half):
            for done, depth, unit in _refined(network, view, padded, settings.device):
                part = from_unit(unit[:, :rows, :columns])
                out[depth, wide.start + inner.start : wide.start + inner.stop] = part[:, inner]
                if settings.on_progress:
                    settings.on_progress((number + done) / len(slabs))
    return out


@dataclass(frozen=True)
class _View:
    """The thick series as seen from the thin slices; what `_refined` needs beside pixels."""

    linear: NDArray[np.float32]
    below: NDArray[np.int64]
    between: NDArray[np.float32]
    facts: NDArray[np.float32]
    thin_facts: NDArray[np.float32]
    fold: int

    @classmethod
    def of(cls, thick: Geometry, target: Geometry, profile: SliceProfile) -> _View:
        thick_z, thin_z = np.asarray(thick.z_mm), np.asarray(target.z_mm)
        pixel = max(thick.spacing_mm_zyx[1:])
        fold = fold_of(pixel)
        places = np.interp(thin_z, thick_z, np.arange(len(thick_z))).astype(np.float32)
        below, between = neighbours(places, len(thick_z))
        steps = thick.spacing_mm_zyx[0], pixel * fold, target.spacing_mm_zyx[0]
        facts, thin_facts = facts_of(profile, *steps, between)
        return cls(linear_weights(profile, thick_z, thin_z), below, between, facts, thin_facts, fold)


def _refined(
    network: PretrainedNetwork, view: _View, thick_hu: NDArray[np.float32], device: str
) -> Iterator[tuple[float, slice, NDArray[np.float32]]]:
    """Refined thin slices of one slab in unit scale, a few at a time: (share done, which slices, slices)."""

    def on_device(array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))[None].to(device)

    features = network.encode(on_device(to_unit(thick_hu)[None]), on_device(view.facts), view.fold)
    count, columns = len(view.linear), thick_hu.reshape(len(thick_hu), -1)
    for start in range(0, count, SLICES):
        depth = slice(start, min(start + SLICES, count))
        wide = slice(max(0, depth.start - HEAD_REACH), min(count, depth.stop + HEAD_REACH))
        linear = (view.linear[wide] @ columns).reshape(-1, *thick_hu.shape[1:])
        below = view.below[wide]
        first, last = int(below.min()), int(below.max())
        unit = network.decode(
            features[:, :, first : last + 2],
            on_device(to_unit(linear)[None]),
            on_device(view.thin_facts[:, wide]),
            on_device(below - first),
            on_device(view.between[wide]),
            view.fold,
        )
        inner = slice(depth.start - wide.start, depth.stop - wide.start)
        # The mixing is most of the time where thin slices are many, and none of it where they are few.
        yield 0.4 + 0.6 * depth.stop / count, depth, unit[0, 0, inner].float().cpu().numpy()


def _whole_cells(hu: NDArray[Any], fold: int) -> tuple[NDArray[np.float32], int, int]:
    """Rows and columns repeated at the end up to whole cells; and how many there were."""
    rows, columns = hu.shape[1:]
    pad = ((0, 0), (0, -rows % fold), (0, -columns % fold))
    return np.pad(np.asarray(hu, np.float32), pad, mode="edge"), rows, columns


def row_slabs(shape: tuple[int, ...], fold: int, reach: int, max_cells: int) -> Iterator[tuple[slice, slice]]:
    """Rows of pixels with their halo, whole cells, and which of those are the slab's own; exact, without overlap.

    Args:
        shape: (K, rows, columns) of the thick series.
        reach: Cells that an output depends on, on each side.
        max_cells: Of a slab with its halo, where one row of cells and its halo are no more than that.
    """
    count, height, width = shape
    rows = -(-height // fold)
    most = max_cells // (count * -(-width // fold))
    own = rows if most >= rows else max(1, most - 2 * reach)
    for start in range(0, rows, own):
        stop = min(rows, start + own)
        low, high = max(0, start - reach), min(rows, stop + reach)
        wide = slice(low * fold, min(high * fold, height))
        yield wide, slice((start - low) * fold, min(stop * fold, height) - wide.start)
