"""Heart, great vessels, airways and pulmonary trees of the synthetic chest, and the clots in them."""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import numpy as np

from pipeline.phantom.anatomy import FAT, Anatomy, Clot, chain, jitter, tubes
from pipeline.phantom.rasterise import Ellipsoid, Material, Point, Tube
from pipeline.phantom.trees import Growth, Segment, grow

Place = Callable[[float, float, float], Point]
"""A point of the standard chest (mm), scaled to this body and moved a little."""


def add_heart_and_vessels(
    anatomy: Anatomy, rng: np.random.Generator, category: str, low_z: float, high_z: float
) -> None:
    """Pericardium, heart chambers, great vessels, airways, and the pulmonary trees with their clots."""
    body = anatomy.body
    a, b = body.cavity
    arterial = Material(rng.uniform(250, 370), 5)
    systemic = Material(rng.uniform(170, 290), 5)
    _add_heart(anatomy, rng, arterial, systemic)
    scale_x, scale_y = a / 118.0, b / 78.0

    def at(x: float, y: float, z: float) -> Point:
        return jitter(rng, (x * scale_x, y * scale_y, z), 1.5)

    arch = [at(-12, -16, 128), at(-17, -19, 160), at(-14, -17, 178), at(0, -6, 188), at(15, 10, 186), at(22, 25, 172)]
    down = [at(23, 28, 150), at(22, 30, 100), at(14, 28, 40), at(8, 26, -20)]
    r = float(rng.uniform(11.5, 15))
    aorta = [*arch, *down]
    radii = [r * f for f in (1.12, 1.1, 1.0, 0.95, 0.9, 0.85, 0.82, 0.8, 0.76, 0.72)]
    sheath = [Tube(s.start, s.end, s.start_radius + 4, s.end_radius + 4, FAT) for s in chain(aorta, radii, FAT)]
    anatomy.solids += sheath
    anatomy.solids += chain(aorta, [v + 1.6 for v in radii], Material(55))
    anatomy.solids += chain(aorta, radii, systemic)
    _add_mediastinum(anatomy, rng, at)
    _add_airways(anatomy, rng, at)
    _add_pulmonary(anatomy, rng, arterial, systemic, at)
    for _ in range(int(rng.integers(0, 6))):
        k = int(rng.integers(len(aorta) - 1))
        spot = (aorta[k][0] + radii[k] * 0.9, aorta[k][1] + radii[k] * 0.3, aorta[k][2])
        anatomy.solids.append(Ellipsoid(spot, (1.6, 2.2, float(rng.uniform(1, 3))), Material(650)))
    if category == "APE":
        _add_clots(anatomy, rng, low_z, high_z)


def _add_heart(anatomy: Anatomy, rng: np.random.Generator, arterial: Material, systemic: Material) -> None:
    g = float(rng.uniform(0.92, 1.08))
    hx, hy, hz = anatomy.body.heart
    ox, oy, oz = hx - 12, hy + 14, hz - 100
    wall = Material(rng.uniform(88, 118), 6, 5)

    def part(center: Point, radii: Point, material: Material, angle: float = 0.0) -> Ellipsoid:
        x, y, z = center
        p, q, r = radii
        return Ellipsoid((g * x + ox, g * y - 8 + oy, z + oz + 100), (g * p, g * q, g * r), material, angle)

    anatomy.solids += [
        part((12, -6, 0), (66, 49, 54), FAT, 0.35),
        part((14, -5, 0), (59, 42, 47), wall, 0.35),
        part((6, -30, 2), (36, 15, 32), arterial, 0.25),
        part((-34, -2, 6), (19, 24, 28), arterial),
        part((36, -2, -6), (34, 28, 36), wall, 0.5),
        part((34, -3, -6), (22, 16, 26), systemic, 0.5),
        part((2, 26, 16), (31, 15, 20), systemic),
        part((18, -44, -10), (30, 8, 36), FAT, 0.2),
    ]
    # Papillary muscles and trabeculae run through the blood of the ventricles and the right atrium, mostly obliquely.
    for (x, y, z), (p, q, r), count in (
        ((34, -3, -6), (20, 14, 24), 9),
        ((6, -30, 2), (33, 13, 29), 14),
        ((-34, -2, 6), (16, 21, 25), 5),
    ):
        for _ in range(count):
            ends = [rng.standard_normal(3) for _ in range(2)]
            ends = [0.9 * e / np.linalg.norm(e) * (p, q, r) for e in ends]
            a, b = (
                (float(g * (x + e[0]) + ox), float(g * (y + e[1]) - 8 + oy), float(z + 100 + oz + g * e[2]))
                for e in ends
            )
            thick = float(rng.uniform(1.0, 3.0))
            anatomy.solids.append(Tube(a, b, thick, 0.6 * thick, wall))
    for y, z in ((-14, 20), (-24, 0), (8, 24)):
        a = (g * -20 + ox, g * y - 8 + oy, 100 + z + oz)
        b = (g * 46 + ox, g * (y - 14) - 8 + oy, 88 + z + oz)
        anatomy.solids.append(Tube(a, b, 1.7, 1.1, systemic))


def _add_mediastinum(anatomy: Anatomy, rng: np.random.Generator, at: Place) -> None:
    """Superior vena cava, oesophagus, azygos and lymph nodes."""
    anatomy.solids += chain([at(-25, -12, 122), at(-24, -12, 180), at(-18, -14, 290)], [8.5, 8, 7], Material(430, 20))
    gullet = [at(6, 26, 290), at(5, 27, 200), at(7, 27, 140), at(10, 26, 60), at(16, 18, 30)]
    anatomy.solids += chain(gullet, [7.5, 7, 7.5, 8, 8], Material(45, 8))
    anatomy.solids += chain(gullet, [2.0, 1.0, 2.5, 1.0, 1.0], Material(-500))
    azygos = [at(-8, 38, 20), at(-9, 38, 170), at(-20, 10, 182), at(-24, -8, 176)]
    anatomy.solids += chain(azygos, [3.5, 4, 4.5, 4], Material(150, 5))
    for _ in range(int(rng.integers(6, 16))):
        spot = at(rng.uniform(-26, 26), rng.uniform(-35, 20), rng.uniform(135, 260))
        r = float(rng.uniform(2, 5))
        anatomy.solids.append(Ellipsoid(spot, (r, r * 0.8, r * float(rng.uniform(0.8, 1.6))), Material(50, 6)))


def _add_pulmonary(anatomy: Anatomy, rng: np.random.Generator, arterial: Material, venous: Material, at: Place) -> None:
    """Pulmonary trunk, arteries and veins of both lungs down to 1 mm."""
    fork, right, left = at(8, -22, 156), at(-40, 6, 148), at(42, 12, 160)
    r = float(rng.uniform(9.5, 12.5))
    central = [(at(12, -40, 126), fork, 1.3 * r, 1.25 * r), (fork, right, 1.02 * r, 0.8 * r), (fork, left, r, 0.8 * r)]
    anatomy.solids += [Tube(p, q, ra + 3, rb + 3, FAT) for p, q, ra, rb in central]
    trunk = [Segment("artery", p, q, 2 * ra, 2 * rb, 0) for p, q, ra, rb in central]
    anatomy.solids += tubes(trunk, arterial)
    anatomy.segments += trunk

    def inside(x: float, y: float, z: float) -> bool:
        return anatomy.body.in_lung(x, y, z, margin=3.0)

    for side, hilum in ((-1.0, right), (1.0, left)):
        lobes = (
            (0.45, -0.3, 1.0),
            (0.8, -0.75, 0.0),
            (0.4, 0.5, -1.0),
            (0.75, 0.6, 0.3),
            (0.9, -0.2, -0.6),
            (0.9, 0.2, 0.5),
            (0.8, -0.6, 0.6),
            (0.9, 0.7, -0.3),
        )
        for x, y, z in lobes:
            for kind, material, shift in (("artery", arterial, 0.0), ("vein", venous, -17.0)):
                growth = Growth(kind, min_radius=0.5, max_segments=420)
                heading = (side * x + rng.uniform(-0.2, 0.2), y + rng.uniform(-0.2, 0.2), z + rng.uniform(-0.2, 0.2))
                root = (hilum[0], hilum[1] + 0.4 * shift, hilum[2] + shift)
                tree = grow(rng, root, heading, float(rng.uniform(4.0, 5.6)), inside, growth)
                anatomy.segments += tree
                anatomy.solids += tubes(tree, material)
                if kind == "vein":
                    anatomy.solids.append(Tube((side * 16.0, 16.0, 118.0), root, 6.0, 5.0, venous))


def _add_airways(anatomy: Anatomy, rng: np.random.Generator, at: Place) -> None:
    """Trachea, main bronchi and airways: wall first, lumen after, so that branches open into each other."""
    carina, right, left = at(-1, 10, 167), at(-36, 15, 141), at(42, 19, 137)
    r = float(rng.uniform(7.5, 9.5))
    central = [
        Segment("airway", at(0, 8, 300), carina, 2 * r, 2 * r, 0),
        Segment("airway", carina, right, 1.7 * r, 1.4 * r, 1),
        Segment("airway", carina, left, 1.5 * r, 1.2 * r, 1),
    ]

    def inside(x: float, y: float, z: float) -> bool:
        return anatomy.body.in_lung(x, y, z, margin=12.0)

    tree = list(central)
    for side, hilum in ((-1.0, right), (1.0, left)):
        for x, y, z in ((0.6, -0.3, 0.9), (0.8, -0.8, -0.2), (0.5, 0.4, -0.9)):
            growth = Growth("airway", min_radius=0.7, length_factor=4.0, max_segments=70)
            tree += grow(rng, hilum, (side * x, y, z), float(rng.uniform(3.2, 4.2)), inside, growth)
    for s in tree:
        wall = 0.7 + 0.09 * s.start_diameter_mm
        radii = (s.start_diameter_mm / 2 + wall, s.end_diameter_mm / 2 + wall)
        anatomy.solids.append(Tube(s.start, s.end, *radii, Material(20, 8)))
    anatomy.solids += tubes(tree, Material(-990))
    anatomy.segments += tree


def _add_clots(anatomy: Anatomy, rng: np.random.Generator, low_z: float, high_z: float) -> None:
    """Filling defects in arteries of 3 mm and more: partial and eccentric, or filling most of the lumen."""
    hosts = [
        s
        for s in anatomy.segments
        if s.kind == "artery" and s.end_diameter_mm >= 3.0 and low_z < (s.start[2] + s.end[2]) / 2 < high_z
    ]
    if not hosts:
        return
    wanted = min(len(hosts), int(rng.integers(4, 12)))
    for index in rng.choice(len(hosts), wanted, replace=False):
        host = hosts[int(index)]
        t0 = float(rng.uniform(0.0, 0.3))
        t1 = min(0.95, t0 + float(rng.uniform(0.35, 0.8)))
        start, end = np.asarray(host.start), np.asarray(host.end)
        vessel = host.start_diameter_mm * (1 - t0) + host.end_diameter_mm * t0
        diameter = min(host.end_diameter_mm, vessel) * float(rng.uniform(0.5, 0.85))
        sideways = np.cross(end - start, rng.standard_normal(3))
        sideways *= float(rng.uniform(0, 0.5)) * (vessel - diameter) / 2 / (np.linalg.norm(sideways) + 1e-9)
        p, q = start + t0 * (end - start) + sideways, start + t1 * (end - start) + sideways
        hu = float(rng.uniform(40, 75))
        length = float(np.linalg.norm(q - p))
        volume = pi * diameter**2 / 4 * length + pi * diameter**3 / 6
        a, b = (float(p[0]), float(p[1]), float(p[2])), (float(q[0]), float(q[1]), float(q[2]))
        anatomy.solids.append(Tube(a, b, diameter / 2, diameter / 2, Material(hu, 4)))
        anatomy.clots.append(Clot(a, b, diameter, vessel, volume, hu))
