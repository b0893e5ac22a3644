"""Division of instances into volumes: exclude what is no axial CT, then split what one series UID mixes up."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline.reading.instance import Instance, other_class
from pipeline.volume import Geometry

SAME_POSITION_MM = 0.01
POSITION_TOLERANCE_MM = 0.06
"""Positions are often rounded to 0.1 mm: deviations up to here are rounding, not geometry."""
SPACING_TOLERANCE = 0.02
THIN_BELOW_MM = 2.5
"""Spacing and thickness below which a series is a thin one."""


@dataclass
class Stack:
    """Slices of one volume, ascending along the slice normal once `assembly.order` has run."""

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


def normal_of(orientation: Sequence[float]) -> NDArray[np.float64]:
    """Unit slice normal: row direction x column direction (PS3.3 C.7.6.2.1.1). Not writeable."""
    return _normal(tuple(orientation))


@lru_cache(maxsize=256)
def _normal(orientation: tuple[float, ...]) -> NDArray[np.float64]:
    """Remembered: every slice of a series asks with the same six numbers."""
    normal = np.cross(orientation[:3], orientation[3:])
    normal = np.asarray(normal / np.linalg.norm(normal), dtype=np.float64)
    normal.flags.writeable = False
    return normal


def heights(instances: Sequence[Instance]) -> NDArray[np.float64]:
    """Positions along the first slice's normal in mm; every instance must have a position."""
    normal = normal_of(instances[0].orientation or ())
    return np.asarray([one.position for one in instances], dtype=np.float64) @ normal


def is_even(z: NDArray[np.float64]) -> bool:
    """Whether ascending positions are evenly spaced, up to rounding. The whole run counts, not neighbours."""
    if len(z) < 3:
        return True
    steps = np.diff(z)
    residual = float(np.abs(z - z[0] - steps.mean() * np.arange(len(z))).max())
    return residual <= max(POSITION_TOLERANCE_MM, SPACING_TOLERANCE * float(np.median(steps)))


MAX_AXIAL_DEG = 45.0
"""Beyond this angle between slice normal and patient axis a stack is a sagittal or coronal reformat."""
MAX_OBLIQUE_DEG = 2.0
"""A derived stack further from the axis than this is an oblique reformat; an original one is tilted."""


_PROJECTIONS = frozenset({"MIP", "MINIP", "MPVR", "PROJECTION IMAGE", "SURFACE", "VRT", "3D", "CPR", "CURVED", "SSD"})
_ALWAYS_APART = ("acquisition", "stack", "kvp", "temporal-position", "cardiac-phase", "cardiac-delay", "trigger-time")
"""Volumes apart even where their slices interleave evenly; the others count only where one volume is no grid."""
_APART_IF_ALTERNATING = frozenset({"type", "contrast", "series-number", "thickness"})
"""Of those others, what tells two reconstructions apart whose slices alternate so evenly that they look like one."""
_APART_IF_NEEDED = ("type", "contrast", "series-number", "thickness", "acquisition-time")
_GREYSCALE = frozenset({"", "MONOCHROME1", "MONOCHROME2"})
FRAME_EACH_SLICE = "frame-of-reference-per-slice"
_FEWEST_IN_FRAME = 3
_COSINE_TOLERANCE = 0.01
_SPACING_TOLERANCE = 1e-3


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
    if one.photometric not in _GREYSCALE:
        return "an image whose values are no grey levels (PhotometricInterpretation)"
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


def split(images: Sequence[Instance]) -> list[Stack]:
    """Volumes mixed up under one series UID, each with a separate discriminator (empty if there is only one).

    Two that nothing but their place in the archive would tell apart are numbered by their SOPInstanceUIDs, so that an
    archive that is packed anew, or a folder whose files are renamed, does not exchange their keys.
    """
    images = sorted(images, key=lambda one: (one.sop_uid, one.frame, one.member))
    stacks = [leaf for stack in _by_lattice(images) for leaf in _by_label(stack)]
    if len(stacks) == 1:
        stacks[0].discriminator = ""
        return stacks
    seen: dict[str, int] = {}
    for stack in stacks:
        stack.flag("split")
        seen[stack.discriminator] = seen.get(stack.discriminator, 0) + 1
        if seen[stack.discriminator] > 1:
            stack.discriminator += f"#{seen[stack.discriminator]}"
    return stacks


def _group(instances: Iterable[Instance], key: Callable[[Instance], Hashable]) -> dict[Hashable, list[Instance]]:
    groups: dict[Hashable, list[Instance]] = {}
    for one in instances:
        groups.setdefault(key(one), []).append(one)
    return groups


def _by_lattice(images: Sequence[Instance]) -> list[Stack]:
    """Split by what no single voxel grid can hold: orientation, pixels, frame of reference; and by kernel."""
    stacks = []
    flags = _forget_frames(images)
    exact = _group(images, lambda one: (one.form.rows, one.form.columns, one.frame_uid, one.kernel))
    for key, group in exact.items():
        clusters: list[list[Instance]] = []
        for one in group:
            home = next((cluster for cluster in clusters if _same_grid(cluster[0], one)), None)
            if home is None:
                clusters.append([one])
            else:
                home.append(one)
        for cluster in clusters:
            first = cluster[0]
            grid = (
                [round(v, 1) + 0.0 for v in first.orientation or ()],
                [round(v, 3) for v in first.pixel_spacing or ()],
            )
            stacks.append(Stack(cluster, discriminator=f"lattice:{key}:{grid}", flags=list(flags)))
    return stacks


def _forget_frames(images: Sequence[Instance]) -> list[str]:
    """Drop frames of reference that most slices have to themselves, a fault of some de-identifiers; returns flags.

    FrameOfReferenceUID says which positions may be compared (PS3.3 C.7.4.1). One for every slice says nothing, and
    an unknown one is the truth.
    """
    frames = _group(images, lambda one: one.frame_uid)
    lone = sum(len(group) for group in frames.values() if len(group) < _FEWEST_IN_FRAME)
    if len(frames) < _FEWEST_IN_FRAME or 2 * lone <= len(images):
        return []
    for one in images:
        one.frame_uid = ""
    return [FRAME_EACH_SLICE]


def _same_grid(one: Instance, other: Instance) -> bool:
    """Same orientation and pixel spacing, up to the rounding of their decimal strings."""
    if (one.orientation is None) != (other.orientation is None):
        return False
    if (one.pixel_spacing is None) != (other.pixel_spacing is None):
        return False
    turned = zip(one.orientation or (), other.orientation or (), strict=True)
    scaled = zip(one.pixel_spacing or (), other.pixel_spacing or (), strict=True)
    return all(abs(a - b) < _COSINE_TOLERANCE for a, b in turned) and all(
        abs(a - b) < _SPACING_TOLERANCE * a for a, b in scaled
    )


def _by_label(stack: Stack) -> list[Stack]:
    """Split by acquisition, energy, phase and the like, but only where their slices share positions or interleave.

    A sequential scan counts every slice as an acquisition, and a spiral gives every slice a separate time; neither is
    several volumes. What tells volumes apart visits the same range more than once.
    """
    if len(stack.instances) < 4 or any(o.position is None or o.orientation is None for o in stack.instances):
        return [stack]
    z = heights(stack.instances)
    ranks = np.argsort(z, kind="stable")
    placed = [stack.instances[int(k)] for k in ranks]
    shared = _shared(z[ranks])
    even = not shared and is_even(z[ranks])
    for label in (*_ALWAYS_APART, *_APART_IF_NEEDED):
        groups = _group(placed, lambda one, label=label: one.labels.get(label, ""))  # type: ignore[misc]
        if len(groups) < 2 or min(len(group) for group in groups.values()) < 2:
            continue
        if even and label in _APART_IF_NEEDED and not (label in _APART_IF_ALTERNATING and _alternate(placed, label)):
            continue
        changes = sum(a.labels.get(label, "") != b.labels.get(label, "") for a, b in pairwise(placed))
        left = sum(_shared(heights(group)) for group in groups.values())
        if (shared and left < shared) or (not shared and changes >= len(groups)):
            parts = [
                Stack(group, f"{stack.discriminator}|{label}:{value}", flags=list(stack.flags))
                for value, group in groups.items()
            ]
            return [leaf for part in parts for leaf in _by_label(part)]
    return [stack]


def _alternate(placed: Sequence[Instance], label: str) -> bool:
    """Whether slices in order of position carry a label's values in turn: 1, 2, 1, 2, ... from end to end."""
    values = [one.labels.get(label, "") for one in placed]
    period = len(set(values))
    return len(values) >= 2 * period and all(a == b for a, b in zip(values, values[period:], strict=False))


def _shared(ascending: NDArray[np.float64]) -> int:
    return sum(b - a < SAME_POSITION_MM for a, b in pairwise(ascending))
