"""Structures of ``ctpipe phantom``: nodules and stretches of vessel with known volume, for volumetry.

A phantom's zip says in its comment how it was made, and the anatomy does not depend on the matrix size, so it is made
again at 16 pixels. Archives of real patients carry no such comment and give no structures.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.metrics import MARGIN_MM, Structure, holds
from pipeline.phantom import PhantomPatient, PhantomSettings, Segment, make_patient
from pipeline.volume import Geometry, SeriesPointer

LUNG_HU = -860.0
"""Middle of the phantom's lung HU (-890 to -830): a half level is then right to 15 HU of more than 150."""
CONTRAST_HU = 300.0
LEAST_RADIUS_MM = 2.0
LEAST_VESSEL_MM = 3.0
"""Least mean diameter of a vessel that is measured."""
STRETCH = (0.25, 0.75)
"""The middle of a segment, away from its branchings."""
NEIGHBOUR_MM = 1.5
"""Vessels at least this thick disturb a measurement beside them."""
AWAY_FROM_MIDLINE_MM = 42.0
"""Beyond this is lung, not mediastinum."""


def known_structures(pointer: SeriesPointer, grid: Geometry) -> tuple[Structure, ...]:
    """The structures of the phantom that a series was read from, as far as they lie in ``grid``; none for others."""
    recipe = phantom_recipe(pointer)
    if recipe is None:
        return ()
    return tuple(s for s in _made_again(json.dumps(recipe, sort_keys=True)) if holds(grid, s))


@functools.lru_cache(maxsize=8)
def _made_again(recipe: str) -> tuple[Structure, ...]:
    """The structures of the phantom made as a zip's comment says; kept, since growing its vessels takes seconds."""
    how = json.loads(recipe)
    settings = PhantomSettings(**{**how["settings"], "margin_mm": tuple(how["settings"]["margin_mm"])})
    return structures(make_patient(how["seed"], 16, how["n_thin"], how["category"], settings))


def phantom_recipe(pointer: SeriesPointer) -> dict[str, Any] | None:
    """Return the recipe of the phantom whose zip holds a series; None for any other source."""
    path = Path(pointer.members[0][0])
    if path.suffix != ".zip" or not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.comment.decode("utf-8"))
    except (ValueError, zipfile.BadZipFile):
        return None
    recipe = found.get("ctpipe-phantom") if isinstance(found, dict) else None
    return recipe if isinstance(recipe, dict) else None


def structures(patient: PhantomPatient) -> tuple[Structure, ...]:
    """Nodules and vessels in the lung with no vessel beside them within the measured region."""
    thick_enough = [s for s in patient.vessels if max(s.start_diameter_mm, s.end_diameter_mm) >= NEIGHBOUR_MM]
    axes = _Axes(thick_enough)
    out: list[Structure] = []
    for nodule in patient.nodules:
        at, radius = nodule.center, max(nodule.radii)
        if min(nodule.radii) >= LEAST_RADIUS_MM and axes.distance(np.array([at])) > radius + MARGIN_MM:
            out.append(Structure("nodule", at, at, radius, nodule.volume_mm3, nodule.hu, LUNG_HU))
    for segment in patient.vessels:
        stretch = _stretch(segment)
        if stretch is None:
            continue
        line = np.linspace(stretch.start, stretch.end, 9)
        if axes.distance(line, without=segment) > stretch.radius_mm + MARGIN_MM:
            out.append(stretch)
    return tuple(out)


def _stretch(segment: Segment) -> Structure | None:
    """The middle of a lung vessel that is thick and lateral enough; its volume is that of a cone's frustum."""
    a, b = np.array(segment.start), np.array(segment.end)
    mean = (segment.start_diameter_mm + segment.end_diameter_mm) / 2
    lateral = min(abs(a[0]), abs(b[0])) >= AWAY_FROM_MIDLINE_MM
    if segment.kind not in ("artery", "vein") or mean < LEAST_VESSEL_MM or not lateral:
        return None
    low, high = (a + (b - a) * share for share in STRETCH)
    taper = segment.end_diameter_mm - segment.start_diameter_mm
    r, s = ((segment.start_diameter_mm + taper * share) / 2 for share in STRETCH)
    volume = np.pi / 3 * float(np.linalg.norm(high - low)) * (r * r + r * s + s * s)
    ends = [(float(p[0]), float(p[1]), float(p[2])) for p in (low, high)]
    return Structure("vessel", ends[0], ends[1], max(r, s), float(volume), CONTRAST_HU, LUNG_HU)


class _Axes:
    """The axes of many segments, to ask how far away the nearest surface is."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.start = np.array([s.start for s in segments])
        self.end = np.array([s.end for s in segments])
        self.along = self.end - self.start
        self.radius = np.array([max(s.start_diameter_mm, s.end_diameter_mm) / 2 for s in segments])

    def distance(self, points: NDArray[np.float64], without: Segment | None = None) -> float:
        """Least distance in mm from the points (n, 3) to a surface, leaving out a segment and those that meet it."""
        squared = np.maximum((self.along**2).sum(axis=1), 1e-9)
        offset = points[:, None] - self.start
        t = np.clip((offset * self.along).sum(axis=2) / squared, 0, 1)
        away = np.linalg.norm(offset - t[..., None] * self.along, axis=2) - self.radius
        if without is not None:
            meets = np.zeros(len(self.start), dtype=bool)
            for point in (without.start, without.end):
                meets |= (self.start == point).all(axis=1) | (self.end == point).all(axis=1)
            away = away[:, ~meets]
        return float(away.min()) if away.size else float("inf")
