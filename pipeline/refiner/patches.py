"""Patches for the refiner: thin slices as truth, and the thick ones measured, or simulated by other slice operators.

A network trained on one scanner's slices alone learns its operator by heart. So half of the patches re-simulate the
thick series from the thin one: boxes and Gaussians of several widths, any phase, closer slices, with and without
overlap.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.forward_model import SliceProfile, default_profile, slice_operator
from pipeline.refiner.inputs import RefinerInput, ThickView, neighbours
from pipeline.volume import Volume, Window, ZMethod, z_weights

GAUSSIAN_WIDTHS = (1.0, 1.34)
"""FWHM of the Gaussian operators over the nominal thickness: 5 mm measures 5.0 to 6.7 mm by scanner."""
CLOSEST = 0.6
"""Least spacing of simulated slices over the nominal thickness; in half of the series it is that thickness itself."""
MEASURED_SHARE = 0.5
"""Share of patches whose thick slices are the measured ones."""
STATED_SHARE = 0.25
"""Share of patches whose linear estimate believes the stated thickness, whatever the operator was."""
MIN_INSIDE = 0.2
"""Share of a patch that should lie inside the window; a few draws are made to find one."""
DRAWS = 4
CONTEXT = 2
"""Thick slices that a patch is shown beside those that it spans."""


@dataclass(frozen=True)
class RefinerCase:
    """One pair, ready to be cut.

    Attributes:
        study_key: For messages.
        thin: The truth, its slices inside the thick series' extent.
        thick: The measured series on the same in-plane grid.
        detail: (z, y, x) float16 HU on thin's grid: what the model's output adds to the interpolation; None for
            nothing.
    """

    study_key: str
    thin: Volume
    thick: Volume
    detail: NDArray[np.float16] | None = None

    @property
    def stated(self) -> SliceProfile:
        """The profile that the thick series' header states."""
        return default_profile(self.thick.geometry.thickness_mm, self.thick.geometry.spacing_mm_zyx[0])


Load = Callable[[str], RefinerCase]
Operator = tuple[SliceProfile, NDArray[np.float64]]
"""A slice profile and the thick slices' positions in mm."""


@dataclass(frozen=True)
class Draw:
    """One patch to be cut.

    Attributes:
        box: Its place on the thin slices' grid.
        operator, told, flips: As `cut_patch` takes them.
        transpose: Rows and columns exchanged.
    """

    case: RefinerCase
    box: tuple[slice, ...]
    operator: Operator | None
    told: SliceProfile | None
    flips: Sequence[int]
    transpose: bool

    @property
    def reach(self) -> int:
        """Thick slices that its thin ones span, and CONTEXT."""
        return shown_slices(self.case, self.box[0], self.operator)


def draw_operator(rng: np.random.Generator, thin_z: NDArray[np.float64], thickness_mm: float) -> Operator:
    """A slice operator for training: box or Gaussian, any phase, slices that abut or overlap.

    Spacing is the nominal thickness or down to CLOSEST of it; thickness is between the spacing and the nominal one.
    """
    spacing = thickness_mm * (1.0 if rng.random() < 0.5 else float(rng.uniform(CLOSEST, 1.0)))
    thickness = float(rng.uniform(spacing, thickness_mm))
    if rng.random() < 0.5:
        profile = SliceProfile("box", thickness)
    else:
        profile = SliceProfile("gaussian", thickness * float(rng.uniform(*GAUSSIAN_WIDTHS)))
    return profile, positions(thin_z, spacing, float(rng.uniform(0.0, 1.0)))


def held_out_operator(thin_z: NDArray[np.float64], thickness_mm: float) -> Operator:
    """The operator that training never draws: a box blurred by 0.6 of its width, slices a third of a spacing off."""
    return SliceProfile("box", thickness_mm, blur_mm=0.6 * thickness_mm), positions(thin_z, thickness_mm, 1 / 3)


def positions(thin_z: NDArray[np.float64], spacing_mm: float, phase: float) -> NDArray[np.float64]:
    """Thick slice positions within the thin series' extent, the first ``phase`` of a spacing after its lowest place.

    The lowest place is where half a spacing of thin slices is below; at least two slices, for interpolation.
    """
    step = float(np.mean(np.diff(thin_z)))
    low, high = float(thin_z[0]) - step / 2 + spacing_mm / 2, float(thin_z[-1]) + step / 2 - spacing_mm / 2
    count = max(2, int(np.floor((high - low) / spacing_mm - phase + 1e-6)) + 1)
    return np.asarray(low + spacing_mm * (phase + np.arange(count)), dtype=np.float64)


def _interpolated(
    thick: NDArray[Any], thick_z: NDArray[np.float64], thin_z: NDArray[np.float64], method: ZMethod
) -> NDArray[np.float32]:
    columns = np.ascontiguousarray(thick, dtype=np.float32).reshape(len(thick), -1)
    weights = z_weights(thick_z, thin_z, method).astype(np.float32)
    base = np.clip(weights @ columns, columns.min(axis=0), columns.max(axis=0))
    return np.asarray(base.reshape(len(thin_z), *thick.shape[1:]), dtype=np.float32)


@dataclass(frozen=True)
class PatchSettings:
    """Settings of patches. ``patches_per_pair`` are taken at each visit; ``held`` pairs are in memory at a time."""

    patch_zyx: tuple[int, int, int] = (20, 64, 64)
    batch: int = 4
    patches_per_pair: int = 64
    held: int = 3
    seed: int = 0


class RefinerPatches:
    """Batches of patches by number: the same (epoch, index) is the same batch, whenever it is asked for.

    Args:
        keys: Pair keys of the split.
        load: Pair key to its case; called again when a pair comes round.
        window: Gives the unit scale.
    """

    def __init__(self, keys: Sequence[str], load: Load, window: Window, settings: PatchSettings) -> None:
        if not keys:
            raise InputError(
                "no pair to train on",
                expected="at least one usable thick/thin pair in the training split",
                remedy="Ingest more, or change the splits.",
            )
        self.keys, self.window, self.settings = sorted(keys), window, settings
        self._load = load
        self._cases: OrderedDict[str, RefinerCase] = OrderedDict()
        self._lock = threading.Lock()
        self.held = min(settings.held, len(self.keys))
        self.steps_per_group = -(-self.held * settings.patches_per_pair // settings.batch)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.keys) // self.held) * self.steps_per_group

    def batch(self, epoch: int, index: int) -> dict[str, Any]:
        """``inputs`` (batched `RefinerInput`), ``target`` (B, 1, D, H, W) in unit scale, ``study_key``: B strings."""
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.keys))
        first = index // self.steps_per_group * self.held
        group = [self.keys[i] for i in order[first : first + self.held]]
        rng = np.random.default_rng([self.settings.seed, epoch, index])
        cases = [self._case(group[int(rng.integers(len(group)))]) for _ in range(self.settings.batch)]
        draws = [self._draw(case, rng) for case in cases]
        # Slices that lie closer need more of them shown, and a batch has one number.
        reach = max(draw.reach for draw in draws)
        cut = [cut_draw(draw, self.window, reach) for draw in draws]
        # Volumes smaller than a patch give smaller ones: a batch takes what all of its patches have.
        depth, *plane = (int(n) for n in np.min([target.shape for _, target in cut], axis=0)[1:])
        slices = min(given.thick.shape[1] for given, _ in cut)
        whole = [cropped(given, slices, depth, plane) for given, _ in cut]
        at = (slice(None), slice(depth), *(slice(n) for n in plane))
        return {
            "inputs": RefinerInput(*(np.stack(part) for part in zip(*whole, strict=True))),
            "target": np.stack([target[at] for _, target in cut]),
            "study_key": [case.study_key for case in cases],
        }

    def _case(self, key: str) -> RefinerCase:
        with self._lock:
            if key not in self._cases:
                self._cases[key] = self._load(key)
                while len(self._cases) > self.held:
                    self._cases.popitem(last=False)
            self._cases.move_to_end(key)
            return self._cases[key]

    def _draw(self, case: RefinerCase, rng: np.random.Generator) -> Draw:
        measured = bool(rng.random() < MEASURED_SHARE)
        thin_z = np.asarray(case.thin.geometry.z_mm)
        operator = None if measured else draw_operator(rng, thin_z, case.stated.fwhm_mm)
        # A fitted profile is the true one, a stated thickness need not be: the network meets both.
        told = case.stated if rng.random() < STATED_SHARE else None
        flips = rng.integers(0, 2, 3).tolist()
        return Draw(case, self._box(case, rng), operator, told, flips, bool(rng.random() < 0.5))

    def _box(self, case: RefinerCase, rng: np.random.Generator) -> tuple[slice, ...]:
        """A patch's place; air alone and bone alone teach nothing, so a few draws look for something in the window."""
        size = self.settings.patch_zyx
        box: tuple[slice, ...] = ()
        for _ in range(DRAWS):
            at = [int(rng.integers(max(1, n - s + 1))) for n, s in zip(case.thin.hu.shape, size, strict=True)]
            box = tuple(slice(a, a + s) for a, s in zip(at, size, strict=True))
            values = case.thin.hu[box]
            if np.mean((values > self.window.lower) & (values < self.window.upper)) >= MIN_INSIDE:
                break
        return box


def shown_slices(case: RefinerCase, depth: slice, operator: Operator | None) -> int:
    """Return the number of thick slices that the thin ones ``depth`` span, and CONTEXT."""
    step = float(np.mean(np.diff(case.thin.geometry.z_mm)))
    spacing = float(np.mean(np.diff(case.thick.geometry.z_mm if operator is None else operator[1])))
    spanned: float = (depth.stop - depth.start) * step / spacing
    return round(spanned) + CONTEXT


def cut_draw(draw: Draw, window: Window, reach: int) -> tuple[RefinerInput, NDArray[np.float32]]:
    """`cut_patch` of a draw, rows and columns exchanged where it says so and the patch is square."""
    inputs, target = cut_patch(draw.case, draw.box, draw.operator, window, draw.flips, draw.told, reach)
    if draw.transpose and target.shape[-2] == target.shape[-1]:
        return transposed(inputs), np.ascontiguousarray(target.swapaxes(-1, -2))
    return inputs, target


def cut_patch(
    case: RefinerCase,
    box: tuple[slice, ...],
    operator: Operator | None,
    window: Window,
    flips: Sequence[int] = (0, 0, 0),
    told: SliceProfile | None = None,
    reach: int | None = None,
) -> tuple[RefinerInput, NDArray[np.float32]]:
    """Inputs and target (1, D, H, W) of one place, in unit scale.

    Args:
        operator: Simulates the thick slices from the thin ones; None takes the measured ones.
        flips: 1 for every axis to be mirrored.
        told: The slice profile that composition believes in; by default the operator's, else the stated box.
        reach: Thick slices to show; by default those that ``box`` spans, and CONTEXT.
    """
    depth, plane = box[0], box[1:]
    columns = case.thin.hu[(slice(None), *plane)]
    thin_z = np.asarray(case.thin.geometry.z_mm)
    if operator is None:
        profile, thick_z = case.stated, np.asarray(case.thick.geometry.z_mm)
        thick = case.thick.hu[(slice(None), *plane)]
    else:
        profile, thick_z = operator
        thick = slice_operator(profile, thick_z, thin_z).apply(columns)
    composed = _interpolated(thick, thick_z, thin_z, "cubic")
    if case.detail is not None:
        composed += case.detail[(slice(None), *plane)].astype(np.float32)
    view = ThickView.of(thick_z, thin_z, told or profile)
    inputs = view.inputs(thick, composed, window, depth, reach or shown_slices(case, depth, operator))
    return flipped(inputs, flips), turned(window.to_unit(columns[depth])[None], flips)


def cropped(given: RefinerInput, slices: int, depth: int, plane: Sequence[int]) -> RefinerInput:
    """The first ``depth`` thin slices and ``plane`` pixels, with the ``slices`` thick ones about their middle."""
    at = tuple(slice(n) for n in plane)
    places = (given.below + given.between)[:depth]
    shown = ThickView.shown(places, slices, given.thick.shape[1])
    where = neighbours(places - np.float32(shown.start), slices)
    return RefinerInput(given.fine[(slice(None), slice(depth), *at)], given.thick[(slice(None), shown, *at)], *where)


def turned(image: NDArray[Any], flips: Sequence[int]) -> NDArray[Any]:
    """(C, D, H, W) with the axes mirrored for which ``flips``, (D, H, W), holds 1."""
    return np.ascontiguousarray(np.flip(image, tuple(i + 1 for i, flip in enumerate(flips) if flip)))


def transposed(given: RefinerInput) -> RefinerInput:
    """Rows and columns exchanged: no organ is oriented so, but edges do."""
    fine, thick = (np.ascontiguousarray(part.swapaxes(-1, -2)) for part in (given.fine, given.thick))
    return RefinerInput(fine, thick, given.below, given.between)


def flipped(given: RefinerInput, flips: Sequence[int]) -> RefinerInput:
    """The same place seen in mirrors: along z the neighbours change sides as well."""
    below, between = given.below, given.between
    if flips[0]:
        below, between = given.thick.shape[1] - 2 - below[::-1], 1 - between[::-1]
    return RefinerInput(
        turned(given.fine, flips),
        turned(given.thick, flips),
        np.ascontiguousarray(below),
        np.ascontiguousarray(between),
    )
