"""From loose instances to stacks: set aside what is no axial CT, split, order, check. Headers only, no pixels.

Every deviation has a stated policy (tests/test_assembly.py shows each):

- set aside (role ``other``): localizers, captures, reformats, projections, maps that are not HU, lone slices;
- split: orientation, in-plane grid, frame of reference, kernel; acquisition, energy, phase, image type and the like
  where their slices share positions or interleave;
- kept with a flag: gantry tilt, variable spacing, mixed rescale, duplicates (dropped), overlap, several thicknesses;
- quarantined: missing slices or positions, conflicting duplicates, slices that shift in plane, unreadable pixel forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.codecs import refused_syntax
from pipeline.geometry import Geometry
from pipeline.instance import MULTIFRAME_CLASSES, Instance, other_class

POSITION_TOLERANCE_MM = 0.06
"""Positions are often rounded to 0.1 mm: deviations up to here are rounding, not geometry."""
SPACING_TOLERANCE = 0.02
SAME_POSITION_MM = 0.01
MIN_TILT_DEG = 0.1
MAX_AXIAL_DEG = 45.0
"""Beyond this angle between slice normal and patient axis a stack is a sagittal or coronal reformat."""
MAX_OBLIQUE_DEG = 2.0
"""A derived stack further from the axis than this is an oblique reformat; an original one is tilted."""
MIN_SLICES = 3
THIN_BELOW_MM = 2.5

_PROJECTIONS = frozenset({"MIP", "MINIP", "MPVR", "PROJECTION IMAGE", "SURFACE", "VRT", "3D", "CPR", "CURVED", "SSD"})
_SPLIT_LABELS = (
    "acquisition", "kvp", "type", "temporal-position", "cardiac-phase", "trigger-time", "contrast", "series-number",
    "thickness", "acquisition-time",
)  # fmt: skip


@dataclass
class Stack:
    """Slices of one volume, ascending along the slice normal once ``order`` has run."""

    instances: list[Instance]
    discriminator: str = ""
    role: str = ""
    status: str = "ok"
    reason: str = ""
    flags: list[str] = field(default_factory=list)
    geometry: Geometry | None = None

    def set_aside(self, reason: str) -> Stack:
        self.role, self.reason = "other", reason
        return self

    def quarantine(self, reason: str) -> Stack:
        self.role, self.status, self.reason = "other", "quarantined", reason
        return self

    def flag(self, name: str) -> None:
        if name not in self.flags:
            self.flags.append(name)


SamePixels = Callable[[Instance, Instance], bool]
"""Whether two instances hold the same image; reads pixels, so it is asked only about slices at one position."""


def assemble(instances: Sequence[Instance], same_pixels: SamePixels) -> list[Stack]:
    """Stacks of one SeriesInstanceUID: volumes first to last, then what is set aside.

    Args:
        instances: All frames that carry the UID, in any order.
        same_pixels: Decides about duplicates.
    """
    if len({(one.patient_id, one.study_uid) for one in instances}) > 1:
        return [Stack(list(instances)).quarantine("one series UID is used by several patients or studies")]
    aside: dict[str, list[Instance]] = {}
    images: list[Instance] = []
    for one in instances:
        reason = why_not_volume(one)
        if reason:
            aside.setdefault(reason, []).append(one)
        else:
            images.append(one)
    stacks = [Stack(group).set_aside(reason) for reason, group in aside.items()]
    for stack in stacks:
        stack.discriminator = f"aside:{stack.reason}"
    volumes = _split_hard(images)
    volumes = [part for volume in volumes for part in _split_soft(volume)]
    for volume in volumes:
        order(volume, same_pixels)
    if len(volumes) == 1:
        volumes[0].discriminator = ""
    return volumes + stacks


def why_not_volume(one: Instance) -> str:
    """Why an instance is no slice of an axial CT volume, or an empty string. Faults of slices are not judged here."""
    name = other_class(one.sop_class)
    if name:
        return f"no CT image but a {name}"
    kinds = set(one.image_type)
    if "LOCALIZER" in kinds or "SCOUT" in kinds:
        return "a localizer"
    if one.samples != 1:
        return "a colour image"
    projection = sorted(kinds & _PROJECTIONS)
    if projection:
        return f"a projection image ({projection[0]})"
    original = one.image_type[:1] != ("DERIVED",)
    if one.position is None and one.orientation is None and ("SECONDARY" in kinds or not original):
        return "a capture without a position in the patient"
    if one.rescale_type not in ("", "HU", "US"):
        return "a map that is not in Hounsfield units"
    if one.orientation is not None:
        angle = _angle_to_axis(one.orientation)
        if angle > MAX_AXIAL_DEG:
            return "a sagittal or coronal image"
        if angle > MAX_OBLIQUE_DEG and not original and abs(abs(one.tilt_deg) - angle) > MAX_OBLIQUE_DEG:
            return "an oblique reformat"
    return ""


def _angle_to_axis(orientation: Sequence[float]) -> float:
    """Degrees between the slice normal and the patient's long axis."""
    normal = normal_of(orientation)
    return math.degrees(math.acos(min(1.0, abs(float(normal[2])))))


def normal_of(orientation: Sequence[float]) -> NDArray[np.float64]:
    """Unit slice normal: row direction x column direction (PS3.3 C.7.6.2.1.1)."""
    normal = np.cross(orientation[:3], orientation[3:])
    return np.asarray(normal / np.linalg.norm(normal), dtype=np.float64)


def _group(instances: Iterable[Instance], key: Callable[[Instance], Hashable]) -> dict[Hashable, list[Instance]]:
    groups: dict[Hashable, list[Instance]] = {}
    for one in instances:
        groups.setdefault(key(one), []).append(one)
    return groups


def _split_hard(images: list[Instance]) -> list[Stack]:
    """Split by what no single lattice can hold: orientation, grid, frame of reference; and by kernel."""
    grids = _group(images, _grid_key)
    stacks = []
    for key, group in grids.items():
        for kernel, part in _group(group, lambda one: one.kernel).items():
            stacks.append(Stack(part, discriminator=f"grid:{key}|kernel:{kernel}"))
    if len(stacks) > 1:
        for stack in stacks:
            stack.flag("split")
    return stacks


def _grid_key(one: Instance) -> Hashable:
    orientation = tuple(round(v, 2) + 0.0 for v in one.orientation) if one.orientation else None
    spacing = tuple(round(v, 4) for v in one.pixel_spacing) if one.pixel_spacing else None
    return (orientation, one.form.rows, one.form.columns, spacing, one.frame_uid)


def _split_soft(stack: Stack) -> list[Stack]:
    """Split by acquisition, energy, phase and the like, but only where their slices share positions or interleave.

    A sequential scan counts every slice as an acquisition, and a spiral gives every slice its own time; neither is
    several volumes. What tells volumes apart visits the same range more than once.
    """
    placed = [one for one in stack.instances if one.position is not None and one.orientation is not None]
    if len(placed) < 2 or len(placed) != len(stack.instances):
        return [stack]
    normal = normal_of(placed[0].orientation or ())
    placed.sort(key=lambda one: float(np.dot(normal, one.position or ())))
    z = [float(np.dot(normal, one.position or ())) for one in placed]
    shared = _shared_positions(z)
    for label in _SPLIT_LABELS:
        groups = _group(placed, lambda one, label=label: one.labels.get(label, ""))  # type: ignore[misc]
        if len(groups) < 2 or min(len(g) for g in groups.values()) < 2:
            continue
        changes = sum(a.labels.get(label, "") != b.labels.get(label, "") for a, b in pairwise(placed))
        interleaved = changes > len(groups) - 1
        if not (interleaved or shared) or not _fewer_shared(groups.values(), shared, normal):
            continue
        parts = [
            Stack(group, f"{stack.discriminator}|{label}:{value}", flags=[*stack.flags])
            for value, group in groups.items()
        ]
        for part in parts:
            part.flag("split")
        return [leaf for part in parts for leaf in _split_soft(part)]
    return [stack]


def _shared_positions(z: Sequence[float]) -> int:
    return sum(b - a < SAME_POSITION_MM for a, b in pairwise(z))


def _fewer_shared(groups: Iterable[list[Instance]], shared: int, normal: NDArray[np.float64]) -> bool:
    """Whether a split removes shared positions (or there were none to remove)."""
    if not shared:
        return True
    left = 0
    for group in groups:
        left += _shared_positions(sorted(float(np.dot(normal, one.position or ())) for one in group))
    return left < shared


def order(stack: Stack, same_pixels: SamePixels) -> None:
    """Sort a stack along its normal, judge its lattice, and fill in geometry, flags, role, status and reason."""
    reason = _slice_fault(stack.instances)
    if reason:
        stack.quarantine(reason)
        return
    first = stack.instances[0]
    normal = normal_of(first.orientation or ())
    stack.instances.sort(key=lambda one: (float(np.dot(normal, one.position or ())), one.member, one.frame))
    conflict = _drop_duplicates(stack, normal, same_pixels)
    positions = np.asarray([one.position for one in stack.instances], dtype=np.float64)
    z = positions @ normal
    stack.geometry = _lattice(stack.instances, positions, z)
    if conflict:
        stack.quarantine(f"{conflict} positions hold different images that nothing in the header tells apart")
    elif len(z) < MIN_SLICES:
        stack.set_aside(f"a lone slice or two ({len(z)}): too few for a volume")
    else:
        _judge(stack, positions, z, normal)


def _slice_fault(instances: Sequence[Instance]) -> str:
    """A fault that makes a stack unusable whatever its order, or an empty string."""
    count = len(instances)
    unplaced = sum(one.position is None or one.orientation is None for one in instances)
    if unplaced:
        return f"position or orientation missing or no number in {unplaced} of {count} slices"
    if any(one.pixel_spacing is None for one in instances):
        return "PixelSpacing missing or no number"
    refused = sum(one.slope is None or one.intercept is None for one in instances)
    if refused:
        return f"RescaleSlope or RescaleIntercept missing in {refused} of {count} slices, so HU are unknown"
    for one in instances:
        if not (math.isfinite(one.slope or 0) and math.isfinite(one.intercept or 0)) or not one.slope:
            return "RescaleSlope or RescaleIntercept is no usable number"
        if abs(one.slope) > 1e3 or abs(one.intercept or 0) > 1e5:
            return "RescaleSlope or RescaleIntercept lies far outside of any CT"
        if 0x00283000 in one.header.elements:
            return "a Modality LUT instead of a linear rescale"
        name = refused_syntax(one.header.syntax)
        if name:
            return f"transfer syntax {name} is not read"
        form = one.form.refusal()
        if form:
            return form
        if one.frames != 1 and one.sop_class not in MULTIFRAME_CLASSES:
            return f"{one.frames} frames in a single-frame CT image"
    return ""


def _drop_duplicates(stack: Stack, normal: NDArray[np.float64], same_pixels: SamePixels) -> int:
    """Keep one of several identical slices at a position; returns how many positions hold different images."""
    kept: list[Instance] = []
    conflicts = 0
    for one in stack.instances:
        here = float(np.dot(normal, one.position or ()))
        if kept and here - float(np.dot(normal, kept[-1].position or ())) < SAME_POSITION_MM:
            if same_pixels(kept[-1], one):
                stack.flag("duplicates-dropped")
                continue
            conflicts += 1
        kept.append(one)
    stack.instances[:] = kept
    return conflicts


def _lattice(instances: Sequence[Instance], positions: NDArray[np.float64], z: NDArray[np.float64]) -> Geometry:
    """The affine in (z, y, x) index order: mean step, row-to-row step, column-to-column step, first position."""
    first = instances[0]
    assert first.orientation is not None
    assert first.pixel_spacing is not None
    row, column = np.asarray(first.orientation[:3]), np.asarray(first.orientation[3:])
    thickness = float(np.median([one.thickness_mm for one in instances]))
    affine = np.eye(4)
    if len(z) > 1:
        affine[:3, 0] = (positions[-1] - positions[0]) / (len(z) - 1)
    else:
        affine[:3, 0] = np.cross(row, column) * (thickness or 1.0)
    affine[:3, 1] = column * first.pixel_spacing[0]
    affine[:3, 2] = row * first.pixel_spacing[1]
    affine[:3, 3] = positions[0]
    return Geometry(
        shape_zyx=(len(z), first.form.rows, first.form.columns),
        affine_lps=tuple(tuple(float(v) for v in line) for line in affine),
        z_mm=tuple(float(v) for v in z),
        thickness_mm=thickness,
    )


def _judge(stack: Stack, positions: NDArray[np.float64], z: NDArray[np.float64], normal: NDArray[np.float64]) -> None:
    """Check the lattice of a sorted stack of at least three slices and give it its role."""
    steps = np.diff(z)
    span = positions[-1] - positions[0]
    along = (z - z[0]) / (z[-1] - z[0])
    sideways = float(np.linalg.norm(positions - positions[0] - along[:, None] * span, axis=1).max())
    tilt = math.degrees(math.acos(min(1.0, abs(float(normal @ span)) / float(np.linalg.norm(span)))))
    typical = float(np.median(steps))
    mean = float(steps.mean())
    residual = float(np.abs(z - z[0] - mean * np.arange(len(z))).max())
    _note_facts(stack, tilt, typical)
    geometry = stack.geometry
    assert geometry is not None
    if sideways > max(POSITION_TOLERANCE_MM, 0.1 * min(geometry.spacing_mm_zyx[1:])):
        stack.quarantine(f"slices shift in plane by up to {sideways:.2f} mm against each other")
        return
    if residual > max(POSITION_TOLERANCE_MM, SPACING_TOLERANCE * typical):
        missing = _missing_slices(steps, typical) if len({o.thickness_mm for o in stack.instances}) == 1 else 0
        if missing:
            stack.quarantine(f"{missing} slices missing: gaps of whole multiples of the spacing {typical:.3g} mm")
        else:
            stack.flag("variable-spacing")
            stack.set_aside(f"spacing varies from {steps.min():.3g} to {steps.max():.3g} mm: resampled only on request")
        return
    thick = max(typical, geometry.thickness_mm) >= THIN_BELOW_MM
    stack.role = "thick" if thick else "thin"


def _missing_slices(steps: NDArray[np.float64], typical: float) -> int:
    """How many slices are missing if every gap is a whole multiple of the spacing, else 0."""
    multiples = steps / typical
    whole = np.abs(multiples - np.round(multiples)) * typical <= max(POSITION_TOLERANCE_MM, SPACING_TOLERANCE * typical)
    return int(np.round(multiples).sum() - len(steps)) if bool(whole.all()) and bool((multiples > 0.5).all()) else 0


def _note_facts(stack: Stack, tilt: float, typical: float) -> None:
    instances = stack.instances
    if tilt > MIN_TILT_DEG:
        stack.flag("gantry-tilt")
    if len({(one.slope, one.intercept) for one in instances}) > 1:
        stack.flag("mixed-rescale")
    if len({one.thickness_mm for one in instances}) > 1:
        stack.flag("mixed-thickness")
    if len({(one.form.bits_stored, one.form.signed, one.form.bits_allocated) for one in instances}) > 1:
        stack.flag("mixed-pixel-form")
    if instances[0].image_type[:1] == ("DERIVED",):
        stack.flag("derived")
    thickness = instances[0].thickness_mm
    if thickness and typical < thickness * (1 - SPACING_TOLERANCE):
        stack.flag("overlapping-slices")
    if thickness and typical > thickness * (1 + SPACING_TOLERANCE) + POSITION_TOLERANCE_MM:
        stack.flag("gaps-between-slices")
    for note in sorted({note for one in instances for note in one.header.notes}):
        stack.flag(note)
