"""A synthetic chest: the body's shell, bones, lungs, organs and vessel trees of one made-up patient.

Patient millimetres in DICOM's LPS sense: x to the left, y to the back, z to the head; the origin is on the midline in
mid-body and z = 0 is in the upper abdomen (domes of the diaphragm near 80, carina near 165, lung apex near 285).
All numbers are typical of an adult; every one of them is varied by the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.phantom.rasterise import Array, Canvas, Material, Point, Solid, Tube
from pipeline.phantom.trees import Segment

FAT = Material(-95, 8, 8)


def chain(points: list[Point], radii: list[float], material: Material, flatten: float = 1.0) -> list[Tube]:
    """Tubes through the points, with the radius given at each, mm."""
    return [
        Tube(a, b, ra, rb, material, flatten)
        for a, b, ra, rb in zip(points, points[1:], radii, radii[1:], strict=False)
    ]


def jitter(rng: np.random.Generator, point: Point, amount: float) -> Point:
    """The point moved by up to ``amount`` mm along each axis."""
    x, y, z = (float(p + amount * rng.uniform(-1, 1)) for p in point)
    return (x, y, z)


AIR = -1000.0


@dataclass(frozen=True)
class Nodule:
    """A lung nodule: centre and semi-axes in mm, volume in mm^3 and its HU."""

    center: Point
    radii: Point
    volume_mm3: float
    hu: float


@dataclass(frozen=True)
class Clot:
    """A filling defect of a pulmonary artery: a tube of clot within the lumen, lengths in mm."""

    start: Point
    end: Point
    diameter_mm: float
    vessel_diameter_mm: float
    volume_mm3: float
    hu: float


@dataclass(frozen=True)
class Body:
    """The shell of the chest, as superelliptic shells about the midline. Lengths in mm."""

    half_width: float
    half_depth: float
    fat: float
    lung_hu: float
    muscle_hu: float
    dome_right: float
    dome_left: float
    mediastinum: float
    table_y: float
    liver_hu: float
    heart: Point

    @property
    def cavity(self) -> tuple[float, float]:
        """Semi-axes of the pleural cavity at its widest."""
        return self.half_width - self.fat - 17.0, self.half_depth - 0.7 * self.fat - 15.0

    @staticmethod
    def taper(z: Array | float) -> Array:
        """Width of the cavity at height z against its widest: narrows to the apex."""
        t = np.clip((np.asarray(z, dtype=np.float32) - 130.0) / 165.0, 0.0, 0.9995)
        return np.asarray(np.sqrt(1 - t**2.4), dtype=np.float32)

    def dome(self, x: Array | float, y: Array | float) -> Array:
        """Height of the diaphragm above (x, y)."""
        a, b = self.cavity
        right, left = -0.48 * a, 0.5 * a
        u = ((x - right) / (0.62 * a)) ** 2 + (y / b) ** 2
        v = ((x - left) / (0.62 * a)) ** 2 + (y / b) ** 2
        return np.asarray(np.maximum(self.dome_right - 34 * u, self.dome_left - 34 * v), dtype=np.float32)

    def radial(self, x: Array, y: Array, axes: tuple[float, float], power: float = 2.5) -> Array:
        """Superelliptic radius of (x, y): 1 on the shell with semi-axes ``axes``."""
        u, v = np.abs(x / axes[0]) ** power, np.abs(y / axes[1]) ** power
        return np.asarray((u + v) ** (1 / power), dtype=np.float32)

    def in_lung(self, x: float, y: float, z: float, margin: float = 0.0) -> bool:
        """Whether a point is in a lung, ``margin`` mm away from its boundary."""
        a, b = self.cavity
        scale = float(self.taper(z))
        a, b = a * scale - margin, b * scale - margin
        if a <= 0 or b <= 0 or abs(x) < self.mediastinum * 0.8:
            return False
        u, v, w = (p - c for p, c in zip((x, y, z), self.heart, strict=True))
        if (u / 68) ** 2 + (v / 52) ** 2 + (w / 55) ** 2 < 1:
            return False
        return abs(x / a) ** 2.5 + abs(y / b) ** 2.5 < 1 and z > float(self.dome(x, y)) + margin

    def paint(self, canvas: Canvas) -> None:
        """Table, skin, fat, muscle, pleural cavity, lungs, and the abdomen below the diaphragm."""
        grid = canvas.grid
        canvas.hu[:] = AIR
        x, y = grid.x[None, :], grid.y[:, None]
        everywhere = (slice(None), slice(None), slice(None))
        self._paint_table(canvas)
        z_scale = self.taper(grid.z)[:, None, None]

        def shell(axes: tuple[float, float], power: float = 2.5) -> Array:
            q = self.radial(x, y, axes, power)
            gy, gx = np.gradient(q)
            return np.asarray(np.clip(0.5 + (1 - q) / (np.hypot(gx, gy) + 1e-4), 0, 1)[None], dtype=np.float32)

        wide, deep, fat = self.half_width, self.half_depth, self.fat
        canvas.paint(everywhere, shell((wide, deep)), Material(45))
        canvas.paint(everywhere, shell((wide - 1.8, deep - 1.8)), Material(-104, 6, 8))
        muscle = shell((wide - 1.8 - fat, deep - 1.8 - 0.7 * fat))
        canvas.paint(everywhere, muscle, Material(self.muscle_hu, 7, 6))
        # Septa of fat through the muscle: where the coarse texture crosses zero, thin sheets that lie at any angle.
        septa = np.clip(0.5 + (0.13 - np.abs(canvas.coarse)) / 0.12, 0, 1)
        canvas.paint(everywhere, np.asarray(0.75 * muscle * septa, dtype=np.float32), Material(-90, 8))
        # Fat between the muscle layers and under the ribs: thin shells, so that the wall is not one grey band.
        a, b = self.cavity
        for gap, thickness in ((11.0, 2.6), (3.0, 2.6)):
            outer, inner = shell((a + gap, b + gap)), shell((a + gap - thickness, b + gap - thickness))
            patchy = np.clip(0.45 + 0.7 * canvas.coarse, 0, 1)
            canvas.paint(everywhere, patchy * np.clip(outer - inner, 0, 1), Material(-90, 12, 10))
        # The cavity narrows to the apex; what it leaves free is muscle and fat of the shoulder girdle.
        q = self.radial(x, y, (a, b))
        gy, gx = np.gradient(q)
        width = np.hypot(gx, gy) + np.float32(1e-4)
        cavity = np.clip(0.5 + (z_scale - q[None]) / width, 0, 1)
        canvas.paint(everywhere, cavity, Material(-95, 8, 10))
        dome = self.dome(x, y)
        slope = np.hypot(*np.gradient(dome))
        above = (grid.z[:, None, None] - dome) / np.sqrt(slope**2 + grid.dz**2)
        # The diaphragm, then the liver under it on the right and fat on the left; other organs come later.
        canvas.paint(everywhere, cavity * np.clip(0.5 - above, 0, 1), Material(52, 6, 4))
        below = cavity * np.clip(0.5 - (grid.z[:, None, None] + 2.5 - dome) / np.sqrt(slope**2 + grid.dz**2), 0, 1)
        canvas.paint(everywhere, below, Material(-100, 9, 12))
        on_right = np.clip(0.5 + (0.12 * a - 0.25 * y - x) / grid.pixel, 0, 1)
        canvas.paint(everywhere, below * on_right, Material(self.liver_hu, 5, 4))
        half = self.mediastinum * (0.35 + 0.65 / (1 + np.exp(-(y + 0.45 * deep) / 9.0)))
        beside = np.clip(0.5 + (np.abs(x) - half) / grid.pixel, 0, 1)
        inner = np.clip(0.5 + (z_scale - q[None] - 1.5 / b) / width, 0, 1)
        lung = inner * beside * np.clip(above - 0.5, 0, 1)
        gravity = (self.lung_hu + 0.35 * (y + 20.0) + np.zeros_like(x)).astype(np.float32)
        target = canvas.hu
        target += lung * (gravity + 22 * canvas.fine + 16 * canvas.coarse - target)

    def _paint_table(self, canvas: Canvas) -> None:
        """A curved couch under the patient: a thin shell around foam."""
        x, y = canvas.grid.x[None, :], canvas.grid.y[:, None]
        depth = (y - self.table_y + 0.0006 * x**2) / canvas.grid.pixel
        foam = np.clip(0.5 + depth, 0, 1) * np.clip(0.5 + 14 / canvas.grid.pixel - depth, 0, 1)
        core = np.clip(0.5 + depth - 2 / canvas.grid.pixel, 0, 1) * np.clip(0.5 + 12 / canvas.grid.pixel - depth, 0, 1)
        side = np.clip(0.5 + (140 - np.abs(x)) / canvas.grid.pixel, 0, 1)
        canvas.hu += (side * (foam * 780 - core * 680))[None]


@dataclass
class Anatomy:
    """Everything that is painted, in order, and what is known of it."""

    body: Body
    solids: list[Solid] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    nodules: list[Nodule] = field(default_factory=list)
    clots: list[Clot] = field(default_factory=list)

    def paint(self, canvas: Canvas) -> None:
        self.body.paint(canvas)
        for solid in self.solids:
            solid.paint(canvas)


def make_body(rng: np.random.Generator) -> Body:
    """Draw the size and shape of a chest."""
    size = rng.uniform(0.92, 1.04)
    dome = rng.uniform(78, 92)
    return Body(
        half_width=142 * size,
        half_depth=102 * size * rng.uniform(0.93, 1.07),
        fat=rng.uniform(7, 20),
        lung_hu=rng.uniform(-890, -830),
        muscle_hu=rng.uniform(48, 66),
        dome_right=dome,
        dome_left=dome - rng.uniform(6, 14),
        mediastinum=rng.uniform(20, 26),
        table_y=112 * size,
        liver_hu=rng.uniform(70, 115),
        heart=(float(rng.uniform(8, 18)), float(rng.uniform(-18, -9)), float(rng.uniform(96, 106))),
    )


def tubes(segments: list[Segment], material: Material) -> list[Tube]:
    """The tubes that draw a tree."""
    return [Tube(s.start, s.end, s.start_diameter_mm / 2, s.end_diameter_mm / 2, material) for s in segments]
