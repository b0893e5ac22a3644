"""From loose instances to stacks: exclude what is no axial CT, split, order, check. Headers only, no pixels.

Every deviation has a stated policy (tests/pipeline/reading/test_assembly.py shows each):

- excluded (role ``other``): localizers, captures, reformats, projections, maps that are not HU, lone slices;
- split: orientation, in-plane grid, frame of reference (unless most slices have one to themselves), kernel;
  acquisition, energy, phase, image type and the like where their slices share positions or interleave;
- kept with a flag: gantry tilt, variable spacing, mixed rescale, duplicates (dropped), overlap, several thicknesses;
- quarantined: missing slices or positions, conflicting duplicates, slices that shift in plane, a negative slope,
  unreadable pixel forms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.reading.codecs import refused_syntax
from pipeline.reading.instance import MULTIFRAME_CLASSES, Instance
from pipeline.reading.stacks import (
    POSITION_TOLERANCE_MM,
    SAME_POSITION_MM,
    SPACING_TOLERANCE,
    THIN_BELOW_MM,
    Stack,
    is_even,
    normal_of,
    split,
    why_not_volume,
)
from pipeline.volume import Geometry

MIN_TILT_DEG = 0.1
MIN_SLICES = 3


SamePixels = Callable[[Instance, Instance], bool]
"""Whether two instances hold the same image; reads pixels, so it is asked only about slices at one position."""


def assemble(instances: Sequence[Instance], same_pixels: SamePixels) -> list[Stack]:
    """Stacks of one SeriesInstanceUID: volumes first to last, then what is excluded.

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
    volumes = split(images)
    for volume in volumes:
        order(volume, same_pixels)
    return volumes + stacks


def order(stack: Stack, same_pixels: SamePixels) -> None:
    """Sort a stack along its normal, judge its grid, and fill in geometry, flags, role, status and reason."""
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
        if one.slope < 0:
            return "a RescaleSlope below zero, which turns the grey scale over"
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
    """Check the grid of a sorted stack of at least three slices and give it its role."""
    steps = np.diff(z)
    span = positions[-1] - positions[0]
    along = (z - z[0]) / (z[-1] - z[0])
    sideways = float(np.linalg.norm(positions - positions[0] - along[:, None] * span, axis=1).max())
    tilt = math.degrees(math.acos(min(1.0, abs(float(normal @ span)) / float(np.linalg.norm(span)))))
    typical = float(np.median(steps))
    _note_facts(stack, tilt, typical)
    geometry = stack.geometry
    assert geometry is not None
    if sideways > max(POSITION_TOLERANCE_MM, 0.1 * min(geometry.spacing_mm_zyx[1:])):
        stack.quarantine(f"slices shift in plane by up to {sideways:.2f} mm against each other")
        return
    if not is_even(z):
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
    """Return the number of missing slices if every gap is a whole multiple of the spacing, else 0."""
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
