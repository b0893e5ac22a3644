"""Patches for the shipped refiner: thin slices from genuine CT and phantoms, thick ones simulated, in every size.

A patch draws how it would have been scanned. Pixels are averaged or interpolated to 0.45 to 2.2 mm, thin slices to at
most 2.5 mm, thick slices simulated by boxes, Gaussians and blurred boxes of 3 to 7.5 mm at any spacing, overlap and
phase. One volume so stands for many, and what is learnt holds at any size. A box blurred by 0.6 of its width, which is
what figures are measured with, is never drawn.

Axis order zyx, lengths in mm, HU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model import SliceProfile, slice_operator
from pipeline.phantom import PhantomSettings, make_patient
from pipeline.refiner import facts_of, fold_of, linear_weights, neighbours, positions
from pipeline.volume import z_weights

Array = NDArray[np.float32]
THICKNESS_MM = (3.0, 7.5)
PIXEL_MM = (0.45, 2.2)
THIN_MM = (0.6, 2.5)
CONTEXT = 3
"""Thick slices beyond the shown ones that the linear estimate still sees."""


@dataclass(frozen=True)
class Source:
    """A thin volume to be cut: (z, y, x) int16 HU."""

    name: str
    hu: NDArray[np.int16]
    spacing: tuple[float, float, float]
    sha256: str = ""


def read_source(path: Path) -> Source:
    """A NIfTI volume, axes turned to ascending zyx."""
    import nibabel

    image: Any = nibabel.as_closest_canonical(nibabel.load(path))
    hu = np.asanyarray(image.dataobj).transpose(2, 1, 0)
    x, y, z = (float(v) for v in image.header.get_zooms()[:3])
    whole = np.ascontiguousarray(np.clip(np.rint(hu), -1024, 3071).astype(np.int16))
    return Source(path.name.removesuffix(".nii.gz"), whole, (z, y, x), hashlib.sha256(path.read_bytes()).hexdigest())


def phantom_source(seed: int) -> Source:
    """A synthetic chest; its pixel, spacing and noise follow from the seed."""
    rng = np.random.default_rng([seed, 77])
    pixel, thin, size = float(rng.uniform(1.2, 2.0)), float(rng.uniform(0.9, 1.5)), 160
    settings = PhantomSettings(
        field_of_view_mm=pixel * size,
        thin_spacing_mm=round(thin, 2),
        thick_spacing_mm=5.0,
        thin_fwhm_mm=1.1 * thin,
        thin_sigma_hu=float(rng.uniform(4.0, 18.0)),
    )
    patient = make_patient(seed, size, 96, "APE" if seed % 2 else "non-APE", settings)
    return Source(f"phantom-{seed}", patient.thin.hu, patient.thin.geometry.spacing_mm_zyx)


@dataclass(frozen=True)
class Scan:
    """How a patch's series were scanned.

    Attributes:
        pixel_mm, thin_mm: Of the thin series.
        soft: How far pixels and slices are averaged, in their own size: (along z, in-plane); 0 interpolates.
        profile, spacing_mm, phase: The thick series.
        told: The profile that the linear estimate believes in.
        turned: The volume's axes that become z, y, x.
        flips: 1 for every axis that is mirrored.
        noise_hu: Added to the thick slices.
    """

    pixel_mm: float
    thin_mm: float
    soft: tuple[float, float]
    profile: SliceProfile
    spacing_mm: float
    phase: float
    told: SliceProfile
    turned: tuple[int, int, int] = (0, 1, 2)
    flips: tuple[int, int, int] = (0, 0, 0)
    noise_hu: float = 0.0


class Patch(NamedTuple):
    """One sample, HU; shapes as `PretrainedNetwork.forward` takes them without the batch axis."""

    thick: Array
    facts: Array
    linear: Array
    thin_facts: Array
    below: NDArray[np.int64]
    between: Array
    target: Array
    fold: int


@dataclass(frozen=True)
class PatchSize:
    """Cells along a side, and the most thick and thin slices."""

    cells: int = 20
    thick: int = 7
    thin: int = 24


@dataclass(frozen=True)
class ScanDrawing:
    """What is drawn how often."""

    turned: float = 0.25
    pixel_mm: tuple[float, float] = PIXEL_MM
    own_pixel: float = 0.15
    own_thin: float = 0.3
    told_true: float = 0.75
    noisy: float = 0.25
    size: PatchSize = field(default_factory=PatchSize)


def draw_scan(source: Source, drawing: ScanDrawing, rng: np.random.Generator) -> Scan:
    """A scan of ``source`` as drawn."""
    turned = (
        (1, 0, 2)
        if rng.random() < drawing.turned / 2
        else (2, 1, 0)
        if rng.random() < drawing.turned / 2
        else (0, 1, 2)
    )
    z, y, x = (source.spacing[i] for i in turned)
    low, high = drawing.pixel_mm
    pixel = float(np.exp(rng.uniform(np.log(max(low, 0.7 * max(y, x))), np.log(high))))
    if turned == (0, 1, 2) and rng.random() < drawing.own_pixel:
        pixel = x
    least = max(THIN_MM[0], 0.8 * z)
    thin = float(np.exp(rng.uniform(np.log(least), np.log(THIN_MM[1]))))
    if z >= THIN_MM[0] and rng.random() < drawing.own_thin:
        thin = z
    thickness = float(rng.uniform(max(THICKNESS_MM[0], 1.8 * thin), THICKNESS_MM[1]))
    if rng.random() < 0.3:
        thickness = 5.0
    spacing = thickness if rng.random() < 0.6 else float(rng.uniform(max(0.6 * thickness, 1.5 * thin), thickness))
    kind = rng.random()
    if kind < 0.35:
        profile = SliceProfile("box", thickness)
    elif kind < 0.65:
        profile = SliceProfile("gaussian", thickness * float(rng.uniform(0.95, 1.3)))
    else:
        profile = SliceProfile(
            "box", thickness * float(rng.uniform(0.8, 1.0)), blur_mm=thickness * float(rng.uniform(0.1, 0.55))
        )
    told = profile if rng.random() < drawing.told_true else SliceProfile("box", thickness)
    soft = tuple(0.0 if rng.random() < 0.3 else float(rng.uniform(0.5, 1.2)) for _ in range(2))
    return Scan(
        pixel,
        thin,
        (soft[0], soft[1]),
        profile,
        spacing,
        float(rng.uniform()),
        told,
        turned,
        (int(rng.integers(2)), int(rng.integers(2)), int(rng.integers(2))),
        float(rng.uniform(2, 15)) if rng.random() < drawing.noisy else 0.0,
    )


def sampling(edges: int, step: float, at: NDArray[np.float64], wide: float) -> Array:
    """Weights (len(at), edges) from samples ``step`` apart to positions: averaged over ``wide``, or interpolated."""
    z = step * np.arange(edges)
    if wide <= step:
        return z_weights(z, at, "cubic" if edges > 3 else "linear").astype(np.float32)
    return slice_operator(SliceProfile("box", wide), at, z).matrix.astype(np.float32)


def cut(source: Source, scan: Scan, size: PatchSize, rng: np.random.Generator) -> Patch:
    """One place of ``source`` under ``scan``."""
    volume, steps = source.hu.transpose(scan.turned), [source.spacing[i] for i in scan.turned]
    fold = fold_of(scan.pixel_mm)
    depth, thick_z, shown = _along_z(len(volume), steps[0], scan, size, rng)
    columns = _in_plane(volume, depth, steps, scan, size.cells * fold, fold, rng)
    z = steps[0] * np.arange(depth.start, depth.stop)
    flat = columns.reshape(len(columns), -1)
    plane = columns.shape[1:]
    thick = slice_operator(scan.profile, thick_z, z).matrix.astype(np.float32) @ flat
    if scan.noise_hu:
        thick += rng.normal(0.0, scan.noise_hu, thick.shape).astype(np.float32)
    thin_z = _thin_positions(thick_z[shown], scan, size, rng)
    target = sampling(len(z), steps[0], thin_z - z[0], scan.soft[0] * scan.thin_mm) @ flat
    # The linear estimate works on a grid of whole slices over all the thick ones; those wanted are a part of it.
    first = thin_z[0] - scan.thin_mm * np.ceil((thin_z[0] - thick_z[0]) / scan.thin_mm + 2)
    grid = first + scan.thin_mm * np.arange(int(np.ceil((thick_z[-1] - first) / scan.thin_mm)) + 3)
    start = int(np.rint((thin_z[0] - first) / scan.thin_mm))
    linear = linear_weights(scan.told, thick_z, grid)[start : start + len(thin_z)] @ thick
    places = np.interp(thin_z, thick_z[shown], np.arange(shown.stop - shown.start)).astype(np.float32)
    below, between = neighbours(places, shown.stop - shown.start)
    facts, thin_facts = facts_of(scan.told, scan.spacing_mm, scan.pixel_mm * fold, scan.thin_mm, between)
    images = [(a.reshape(len(a), *plane)) for a in (thick[shown], linear, target)]
    return flipped(Patch(images[0], facts, images[1], thin_facts, below, between, images[2], fold), scan.flips)


def flipped(p: Patch, flips: Sequence[int]) -> Patch:
    """The same place in mirrors; along z the neighbours change sides."""
    axes = tuple(i for i in range(3) if flips[i])
    if not axes:
        return p
    thick, linear, target = (np.ascontiguousarray(np.flip(a, axes)) for a in (p.thick, p.linear, p.target))
    below, between, thin_facts = p.below, p.between, p.thin_facts
    if flips[0]:
        below, between = np.ascontiguousarray(len(thick) - 2 - below[::-1]), np.ascontiguousarray(1 - between[::-1])
        thin_facts = np.ascontiguousarray(thin_facts[:, ::-1])
    return Patch(thick, p.facts, linear, thin_facts, below, between, target, p.fold)


def _along_z(
    count: int, step: float, scan: Scan, size: PatchSize, rng: np.random.Generator
) -> tuple[slice, NDArray[np.float64], slice]:
    """Source slices to read, thick positions (absolute mm) that the estimate sees, and which of those are shown."""
    z = step * np.arange(count)
    every = positions(np.asarray(z, np.float64), scan.spacing_mm, scan.phase)
    shown = min(size.thick, len(every))
    k = int(rng.integers(len(every) - shown + 1))
    low, high = max(0, k - CONTEXT), min(len(every), k + shown + CONTEXT)
    reach = 1.5 * scan.profile.fwhm_mm + scan.profile.blur_mm
    a = int(np.clip(np.floor((every[low] - reach) / step), 0, count))
    b = int(np.clip(np.ceil((every[high - 1] + reach) / step) + 1, 0, count))
    return slice(a, b), every[low:high], slice(k - low, k - low + shown)


def _thin_positions(
    shown_z: NDArray[np.float64], scan: Scan, size: PatchSize, rng: np.random.Generator
) -> NDArray[np.float64]:
    span = float(shown_z[-1] - shown_z[0])
    count = max(1, min(size.thin, int(span / scan.thin_mm)))
    start = shown_z[0] + float(rng.uniform(0, max(0.0, span - (count - 1) * scan.thin_mm)))
    return np.asarray(start + scan.thin_mm * np.arange(count))


def _in_plane(
    volume: NDArray[np.int16],
    depth: slice,
    steps: list[float],
    scan: Scan,
    pixels: int,
    fold: int,
    rng: np.random.Generator,
) -> Array:
    """(z, rows, columns) float32 HU at the scan's pixel, a whole number of cells, somewhere inside the body."""
    counts = [min(pixels, int(volume.shape[i] * steps[i] / scan.pixel_mm) // fold * fold) for i in (1, 2)]
    spans = [int(np.ceil(counts[i] * scan.pixel_mm / steps[i + 1])) for i in range(2)]
    middle = volume[(depth.start + depth.stop) // 2]
    place = (slice(0), slice(0))
    for _ in range(6):
        at = [int(rng.integers(max(1, volume.shape[i + 1] - spans[i] + 1))) for i in range(2)]
        place = (slice(at[0], at[0] + spans[0] + 1), slice(at[1], at[1] + spans[1] + 1))
        if np.mean(middle[place] > -920) > 0.35:
            break
    out = np.asarray(volume[(depth, *place)], np.float32)
    wide = scan.soft[1] * scan.pixel_mm
    for axis in (1, 2):
        n = out.shape[axis]
        at_mm = np.asarray((np.arange(counts[axis - 1]) + 0.5) * scan.pixel_mm - 0.5 * steps[axis], np.float64)
        weights = sampling(n, steps[axis], at_mm, wide)
        out = np.moveaxis(np.moveaxis(out, axis, -1) @ weights.T, -1, axis)
    return np.ascontiguousarray(out)
