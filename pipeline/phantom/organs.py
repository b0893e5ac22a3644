"""Bones, lung nodules and the upper abdomen of the synthetic chest."""

from __future__ import annotations

from math import cos, pi, sin

import numpy as np

from pipeline.phantom.anatomy import FAT, Anatomy, Nodule, chain, jitter, tubes
from pipeline.phantom.rasterise import Ellipsoid, Material, Point, Tube
from pipeline.phantom.trees import Growth, grow

CORTEX = Material(680, 40, 40)
MARROW = Material(190, 45, 30)


def add_bones(anatomy: Anatomy, rng: np.random.Generator, low_z: float, high_z: float) -> None:
    """Ribs, spine and sternum: cortex around marrow, ribs sloping down towards the front."""
    a, b = anatomy.body.cavity
    spacing, drop = rng.uniform(23, 27), rng.uniform(55, 80)
    phase, radius = rng.uniform(0, spacing), rng.uniform(4.6, 5.6)
    first = int(np.floor((low_z - phase) / spacing)) - 1
    last = int(np.ceil((high_z + drop - phase) / spacing)) + 1
    for k in range(first, last + 1):
        top = phase + k * spacing
        if top > 300:
            continue
        for side in (-1.0, 1.0):
            angles = np.linspace(0.12 * pi, 0.86 * pi, 22)
            points: list[Point] = []
            for angle in angles:
                z = top - drop * (angle / pi) ** 1.15
                scale = float(anatomy.body.taper(z))
                c, s = cos(angle), sin(angle)
                norm = (abs(s) ** 2.5 + abs(c) ** 2.5) ** (-1 / 2.5)
                points.append((side * (a * scale + 4.5) * norm * s, (b * scale + 4.5) * norm * c, z))
            # The front end is cartilage; bone ends two segments earlier.
            bone, n = points[:-3], len(points) - 3
            anatomy.solids += chain(points[-4:], [radius] * 4, Material(105, 15), 1.25)
            anatomy.solids += chain(bone, [radius] * n, CORTEX, 1.25)
            anatomy.solids += chain(bone, [radius - 1.7] * n, MARROW, 1.25)
    _add_spine(anatomy, rng, low_z, high_z)
    front = -b - 3.0
    anatomy.solids += [
        Ellipsoid((0, front, 165), (19, 6.5, 75), CORTEX),
        Ellipsoid((0, front, 165), (17, 4.8, 73), MARROW),
    ]


def _add_spine(anatomy: Anatomy, rng: np.random.Generator, low_z: float, high_z: float) -> None:
    """Vertebrae of 20-24 mm with discs, canal, arch, spinous and transverse processes; a slight curve."""
    _, b = anatomy.body.cavity
    height, phase = rng.uniform(20, 24), rng.uniform(0, 22)
    depth, width = rng.uniform(14, 16.5), rng.uniform(16, 19)
    y0 = b - 32.0
    lean = rng.uniform(-0.03, 0.03)
    muscle = Material(anatomy.body.muscle_hu, 8, 8)
    for side in (-1.0, 1.0):
        anatomy.solids.append(Tube((side * 24, y0 + 34, low_z - 20), (side * 22, y0 + 34, high_z + 20), 15, 14, muscle))
    anatomy.solids.append(Tube((0, y0, low_z - 20), (0, y0, high_z + 20), width + 1.5, width + 1.5, FAT))
    anatomy.solids.append(Tube((0, y0, low_z - 20), (0, y0, high_z + 20), depth - 1, depth - 1, Material(85, 6)))
    for k in range(int((low_z - phase) // height) - 1, int((high_z - phase) // height) + 2):
        z = phase + (k + 0.5) * height
        x = lean * (z - 120)
        anatomy.solids += [
            Tube((x, y0 + 16, z), (x, y0 + 42, z - 16), 4.4, 3.4, CORTEX, 1.7),
            Tube((x, y0 + 16, z), (x, y0 + 41, z - 16), 2.8, 2.0, MARROW, 1.7),
        ]
        for side in (-1.0, 1.0):
            anatomy.solids += [
                Tube((x, y0 + 22, z), (x + side * 31, y0 + 30, z + 3), 5.0, 4.2, CORTEX, 1.3),
                Tube((x, y0 + 22, z), (x + side * 30, y0 + 30, z + 3), 3.2, 2.6, MARROW, 1.3),
            ]
        half = 0.5 * height - 2.4
        # A vertebral body is a drum: an ellipsoid far taller than the vertebra, cut by stacking short tubes would be
        # costly, so three overlapping discs stand for end plate, body and end plate.
        for dz, grow_by in ((-half + 1.2, 0.6), (half - 1.2, 0.6)):
            anatomy.solids.append(Ellipsoid((x, y0, z + dz), (width + grow_by, depth + grow_by, 3.4), CORTEX))
        anatomy.solids.append(Ellipsoid((x, y0, z), (width, depth, 1.45 * half), CORTEX))
        anatomy.solids.append(Ellipsoid((x, y0, z), (width - 1.4, depth - 1.4, 1.3 * half), MARROW))
        anatomy.solids.append(Ellipsoid((x, y0, z + 0.5 * height), (width - 2, depth - 2, 2.4), Material(92, 8)))
    anatomy.solids += [
        Tube((0, y0 + 24, low_z - 20), (0, y0 + 24, high_z + 20), 8.5, 8.5, Material(5, 4)),
        Tube((0, y0 + 24, low_z - 20), (0, y0 + 24, high_z + 20), 5.0, 5.0, Material(40, 4)),
    ]


def add_nodules(anatomy: Anatomy, rng: np.random.Generator, low_z: float, high_z: float) -> None:
    """A few lung nodules: ground-glass, solid and calcified, of 3 to 14 mm."""
    body = anatomy.body
    a, b = body.cavity
    wanted, tries = int(rng.integers(1, 6)), 0
    while len(anatomy.nodules) < wanted and tries < 400:
        tries += 1
        center = (
            float(rng.uniform(-a, a)),
            float(rng.uniform(-b, b)),
            float(rng.uniform(low_z + 8, max(low_z + 9, high_z - 8))),
        )
        if not body.in_lung(*center, margin=9.0) or abs(center[0]) < 42:
            continue
        r = float(np.exp(rng.uniform(np.log(1.8), np.log(7.0))))
        radii = (r * rng.uniform(0.85, 1.15), r * rng.uniform(0.85, 1.15), r * rng.uniform(0.85, 1.15))
        hu = float(rng.choice([-480.0, 35.0, 60.0, 250.0], p=[0.2, 0.4, 0.3, 0.1]))
        anatomy.solids.append(Ellipsoid(center, radii, Material(hu, 10)))
        anatomy.nodules.append(Nodule(center, radii, float(4 / 3 * pi * np.prod(radii)), hu))


def add_abdomen(anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Liver with its vessels and lesions, spleen, stomach with gas over fluid."""
    body = anatomy.body
    a, b = body.cavity
    right, left = body.dome_right, body.dome_left
    liver = Material(body.liver_hu, 5, 4)
    center = (-0.42 * a, -0.02 * b, right - 66)
    anatomy.solids += [
        Ellipsoid(center, (0.55 * a, 0.9 * b, 63), liver),
        Ellipsoid((0.05 * a, -0.3 * b, right - 68), (0.55 * a, 0.48 * b, 54), liver, angle=0.2),
    ]
    hepatic = Material(rng.uniform(135, 190), 3)
    inside = Ellipsoid(center, (0.5 * a, 0.82 * b, 57), liver)

    def in_liver(x: float, y: float, z: float) -> bool:
        d = [(p - c) / r for p, c, r in zip((x, y, z), inside.center, inside.radii, strict=True)]
        return sum(v * v for v in d) < 1

    growth = Growth("hepatic", min_radius=0.8, length_base=5, length_factor=3.2, max_segments=90)
    for heading in ((-1.0, -0.6, -0.2), (-1.0, 0.4, -0.3), (-0.5, -0.9, 0.1)):
        root = jitter(rng, (center[0] + 0.28 * a, center[1] + 0.15 * b, right - 22), 5)
        tree = grow(rng, root, heading, rng.uniform(3.5, 5), in_liver, growth)
        anatomy.segments += tree
        anatomy.solids += tubes(tree, hepatic)
    for _ in range(int(rng.integers(0, 5))):
        spot = jitter(rng, (center[0], center[1], right - 40), 28)
        r = float(rng.uniform(2, 9))
        anatomy.solids.append(Ellipsoid(spot, (r, r, r), Material(float(rng.choice([8.0, 45.0, 150.0])), 3)))
    spleen = Material(rng.uniform(105, 145), 6, 9)
    anatomy.solids.append(Ellipsoid((0.66 * a, 0.45 * b, left - 46), (0.22 * a, 0.42 * b, 38), spleen, angle=-0.5))
    stomach = (0.48 * a, -0.2 * b, left - 44)
    size = (0.34 * a, 0.45 * b, 38.0)
    anatomy.solids += [
        Ellipsoid(stomach, size, Material(70, 8)),
        Ellipsoid(stomach, (size[0] - 4, size[1] - 4, size[2] - 4), Material(22, 6, 12)),
        Ellipsoid(stomach, (size[0] - 4, size[1] - 4, size[2] - 4), Material(-980), front_of_y=float(stomach[1] - 8)),
    ]
