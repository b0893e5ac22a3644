"""Branching trees (vessels, airways) that grow through a region, by Murray's law, with every segment known."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin, sqrt

import numpy as np

from pipeline.phantom.rasterise import Point


@dataclass(frozen=True)
class Segment:
    """A piece of a tree: a tapered tube, mm, patient coordinates (x, y, z).

    Attributes:
        kind: ``artery``, ``vein``, ``airway``, ``hepatic``, ``aorta``, ``coronary``, ...
        generation: Number of branchings above it.
    """

    kind: str
    start: Point
    end: Point
    start_diameter_mm: float
    end_diameter_mm: float
    generation: int


@dataclass(frozen=True)
class Growth:
    """Growth rule of a tree. Lengths in mm; a child's length is ``length_base + length_factor * radius``."""

    kind: str
    min_radius: float = 0.5
    length_base: float = 5.0
    length_factor: float = 5.0
    angle: float = 0.6
    wander: float = 0.25
    max_segments: int = 320


def _unit(x: float, y: float, z: float) -> Point:
    n = sqrt(x * x + y * y + z * z) or 1.0
    return (x / n, y / n, z / n)


def _tilt(direction: Point, polar: float, azimuth: float) -> Point:
    """The direction turned by ``polar`` radians, around itself by ``azimuth``."""
    dx, dy, dz = direction
    # Any perpendicular pair will do: the azimuth is random or relative to its sibling's.
    ax, ay, az = _unit(-dy, dx, 0.0) if abs(dz) < 0.9 else _unit(0.0, -dz, dy)
    bx, by, bz = dy * az - dz * ay, dz * ax - dx * az, dx * ay - dy * ax
    c, s, ca, sa = cos(polar), sin(polar), cos(azimuth), sin(azimuth)
    return _unit(c * dx + s * (ca * ax + sa * bx), c * dy + s * (ca * ay + sa * by), c * dz + s * (ca * az + sa * bz))


def grow(
    rng: np.random.Generator,
    start: Point,
    direction: Point,
    radius: float,
    inside: Callable[[float, float, float], bool],
    growth: Growth,
) -> list[Segment]:
    """Grow a tree from ``start`` (mm) within the region where ``inside(x, y, z)``.

    Radii follow Murray's law, r0^3 = r1^3 + r2^3. A branch that would leave the region is turned a few times, then
    dropped. Breadth first, so that ``max_segments`` cuts the smallest branches.
    """
    segments: list[Segment] = []
    queue: deque[tuple[Point, Point, float, int]] = deque([(start, _unit(*direction), radius, 0)])
    draws = rng.random((growth.max_segments * 4 + 64, 4)).tolist()
    used = 0
    while queue and len(segments) < growth.max_segments and used + 9 < len(draws):
        origin, heading, r, generation = queue.popleft()
        placed: tuple[Point, Point] | None = None
        for attempt in range(4):
            u = draws[used]
            used += 1
            turned = _tilt(heading, growth.wander * (u[0] + 0.8 * attempt), 2 * pi * u[1])
            length = (growth.length_base + growth.length_factor * r) * (0.65 + 0.7 * u[2]) * (1 - 0.15 * attempt)
            end = (origin[0] + length * turned[0], origin[1] + length * turned[1], origin[2] + length * turned[2])
            if inside(*end) or generation == 0:
                placed = (end, turned)
                break
        if placed is None:
            continue
        end, turned = placed
        end_radius = r * 0.92
        segments.append(Segment(growth.kind, origin, end, 2 * r, 2 * end_radius, generation))
        u = draws[used]
        used += 1
        share = 0.25 + 0.5 * u[0]
        azimuth = 2 * pi * u[1]
        for fraction, side in ((share, 0.0), (1 - share, pi)):
            child = end_radius * fraction ** (1 / 3)
            if child >= growth.min_radius:
                polar = growth.angle * (1.4 - fraction) * (0.7 + 0.6 * u[2])
                queue.append((end, _tilt(turned, polar, azimuth + side), child, generation + 1))
    return segments
