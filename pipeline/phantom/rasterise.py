"""Rasteriser of the phantom: analytic solids painted in order on a voxel grid, with partial volume.

A solid covers a voxel by ``clip(1/2 + f / w, 0, 1)``, where ``f`` is the (first order) signed distance to its surface
and ``w`` the width of the voxel seen along the surface normal. So edges are band-limited at any pixel size, while in z
they stay as sharp as the fine grid: the blur along z comes only from the slice-sensitivity profile applied afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import scipy.fft
from numpy.typing import NDArray


def noise_power(size: int, pixel_mm: float, peak_lp_mm: float) -> NDArray[np.float32]:
    """Amplitude spectrum (size, size // 2 + 1) of filtered back-projection noise: a ramp under a Gaussian roll-off.

    NPS(f) = f exp(-(f / p)^2 / 2), whose maximum is at p = ``peak_lp_mm`` (cycles per mm), held below half of the pixel
    grid's Nyquist frequency. A small constant keeps the lowest frequencies alive, as beam hardening and scatter do.
    """
    fy = np.fft.fftfreq(size, pixel_mm)[:, None]
    fx = np.fft.rfftfreq(size, pixel_mm)[None, :]
    f = np.hypot(fy, fx)
    peak = min(peak_lp_mm, 0.5 * 0.5 / pixel_mm)
    power = (f / peak + 0.03) * np.exp(-0.5 * (f / peak) ** 2)
    return np.asarray(np.sqrt(power), dtype=np.float32)


def slice_noise(
    rng: np.random.Generator, n_slices: int, size: int, pixel_mm: float, sigma_hu: float, peak_lp_mm: float
) -> NDArray[np.float32]:
    """Gaussian noise (n_slices, size, size) of standard deviation ``sigma_hu``, independent between slices."""
    amplitude = noise_power(size, pixel_mm, peak_lp_mm)
    full = np.concatenate([amplitude, amplitude[:, 1 : (size + 1) // 2][:, ::-1]], axis=1)
    amplitude = amplitude * np.float32(sigma_hu / np.sqrt(np.mean(full.astype(np.float64) ** 2)))
    white = rng.standard_normal((n_slices, size, size), dtype=np.float32)
    spectrum = scipy.fft.rfft2(white, axes=(1, 2), workers=1)
    spectrum *= amplitude
    return np.asarray(scipy.fft.irfft2(spectrum, s=(size, size), axes=(1, 2), workers=1), dtype=np.float32)


Array = NDArray[np.float32]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """A block of voxels in patient millimetres: centres along x (to the left), y (to the back) and z (to the head)."""

    x: Array
    y: Array
    z: Array

    @property
    def pixel(self) -> float:
        return float(self.x[1] - self.x[0])

    @property
    def dz(self) -> float:
        return float(self.z[1] - self.z[0]) if len(self.z) > 1 else 0.5

    def box(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> tuple[slice, slice, slice] | None:
        """Voxels whose centres lie within [low, high] (x, y, z), one pixel added in-plane; None when empty."""
        slices = []
        for axis, lo, hi, pad in (
            (self.z, low[2], high[2], self.dz),
            (self.y, low[1], high[1], self.pixel),
            (self.x, low[0], high[0], self.pixel),
        ):
            first, last = np.searchsorted(axis, (lo - pad, hi + pad))
            if first >= last:
                return None
            slices.append(slice(int(first), int(last)))
        return (slices[0], slices[1], slices[2])


@dataclass(frozen=True)
class Material:
    """HU of a tissue plus the amplitudes (HU) of the fine and the coarse texture field."""

    hu: float
    fine: float = 0.0
    coarse: float = 0.0


@dataclass
class Canvas:
    """HU on a grid, with two zero-mean, unit-variance texture fields on the same grid."""

    grid: Grid
    hu: Array
    fine: Array
    coarse: Array

    def paint(self, box: tuple[slice, slice, slice], coverage: Array, material: Material) -> None:
        """Mix ``material`` into the box by its coverage in [0, 1]."""
        target = self.hu[box]
        value: Array | np.float32 = np.float32(material.hu)
        if material.fine:
            value = value + np.float32(material.fine) * self.fine[box]
        if material.coarse:
            value = value + np.float32(material.coarse) * self.coarse[box]
        target += coverage * (value - target)


class Solid(Protocol):
    """Anything that can be painted on a canvas."""

    def paint(self, canvas: Canvas) -> None: ...


@dataclass(frozen=True)
class Tube:
    """A tapered capsule from ``start`` to ``end``; lengths in mm. ``flatten`` > 1 makes it taller in z (ribs)."""

    start: Point
    end: Point
    start_radius: float
    end_radius: float
    material: Material
    flatten: float = 1.0

    def paint(self, canvas: Canvas) -> None:
        grid = canvas.grid
        a, b = np.asarray(self.start), np.asarray(self.end)
        r = max(self.start_radius, self.end_radius)
        reach = np.array([r, r, r * self.flatten])
        box = grid.box(np.minimum(a, b) - reach, np.maximum(a, b) + reach)
        if box is None:
            return
        axis = b - a
        axis[2] /= self.flatten
        length2 = float(axis @ axis) + 1e-9
        x = grid.x[box[2]] - np.float32(a[0])
        y = (grid.y[box[1]] - np.float32(a[1]))[:, None]
        z = ((grid.z[box[0]] - np.float32(a[2])) / np.float32(self.flatten))[:, None, None]
        ux, uy, uz = (np.float32(v) for v in axis / length2)
        t = np.clip(x * ux + y * uy + z * uz, 0.0, 1.0)
        ex2 = (x - t * np.float32(axis[0])) ** 2 + (y - t * np.float32(axis[1])) ** 2
        ez2 = (z - t * np.float32(axis[2])) ** 2
        d2 = ex2 + ez2 + np.float32(1e-6)
        pixel, dz = grid.pixel, grid.dz / self.flatten
        # Distance over voxel width along the normal; both scaled by the distance, so one square root is saved.
        width = np.sqrt((np.float32(pixel**2) * ex2 + np.float32(dz**2) * ez2) / d2 + np.float32(1e-6))
        radius = np.float32(self.start_radius) + t * np.float32(self.end_radius - self.start_radius)
        coverage = np.clip(0.5 + (radius - np.sqrt(d2)) / width, 0.0, 1.0)
        mean_radius = (self.start_radius + self.end_radius) / 2
        if mean_radius < pixel:
            along_z = round(abs(float(axis[2])) / length2**0.5, 1)
            coverage *= np.float32(thin_factor(round(mean_radius / pixel, 2), along_z, round(dz / pixel, 3)))
        canvas.paint(box, coverage, self.material)


@lru_cache(maxsize=4096)
def thin_factor(radius: float, along_z: float, dz: float) -> float:
    """Return the factor that makes a tube's coverage, summed over voxels, the true cross-section, pi r^2.

    The clipped ramp makes a tube thinner than a pixel too heavy. Lengths in pixels; ``along_z`` is the z component of
    its unit direction. Integrates the ramp over the plane across the tube.
    """
    reach = np.linspace(-radius - 0.75, radius + 0.75, 64)
    flat, tilted = np.meshgrid(reach, reach)
    d2 = flat**2 + tilted**2 + 1e-9
    nz2 = tilted**2 * (1 - along_z**2) / d2
    width = np.sqrt(1 - nz2 + dz**2 * nz2)
    coverage = np.clip(0.5 + (radius - np.sqrt(d2)) / width, 0.0, 1.0)
    return float(min(1.0, np.pi * radius**2 / (coverage.sum() * (reach[1] - reach[0]) ** 2)))


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid with semi-axes ``radii`` (mm), turned by ``angle`` (radians) in the axial plane."""

    center: Point
    radii: Point
    material: Material
    angle: float = 0.0
    below_z: float | None = None
    front_of_y: float | None = None

    def paint(self, canvas: Canvas) -> None:
        grid = canvas.grid
        reach = np.asarray(self.radii, dtype=np.float64)
        if self.angle:
            reach = np.array([max(self.radii[:2]), max(self.radii[:2]), self.radii[2]])
        center = np.asarray(self.center)
        high = center + reach
        if self.below_z is not None:
            high[2] = min(high[2], self.below_z)
        box = grid.box(center - reach, high)
        if box is None:
            return
        dx = grid.x[box[2]] - np.float32(center[0])
        dy = (grid.y[box[1]] - np.float32(center[1]))[:, None]
        dz = (grid.z[box[0]] - np.float32(center[2]))[:, None, None] / np.float32(self.radii[2])
        c, s = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        u = (c * dx + s * dy) / np.float32(self.radii[0])
        v = (c * dy - s * dx) / np.float32(self.radii[1])
        plane = u**2 + v**2
        slope = np.float32(grid.pixel**2) * (
            (u / np.float32(self.radii[0])) ** 2 + (v / np.float32(self.radii[1])) ** 2
        ) + np.float32(1e-8)
        q2 = plane + dz**2
        q = np.sqrt(q2 + np.float32(1e-6))
        width = np.sqrt(slope + (dz * np.float32(grid.dz / self.radii[2])) ** 2) / q
        coverage = np.clip(np.float32(0.5) + (1 - q) / width, 0.0, 1.0, dtype=np.float32)
        if self.front_of_y is not None:
            level = np.clip(0.5 + (np.float32(self.front_of_y) - grid.y[box[1]]) / grid.pixel, 0.0, 1.0)
            coverage = coverage * level[:, None].astype(np.float32)
        canvas.paint(box, coverage, self.material)


@dataclass(frozen=True)
class Texture:
    """A smooth random field defined in space, so that blocks rendered apart fit together.

    Values on a coarse grid of ``spacing`` mm, interpolated by quadratic B-splines along each axis.
    """

    nodes: Array
    origin: Point
    spacing: float
    gain: float = 1.0

    @classmethod
    def random(cls, rng: np.random.Generator, low: Point, high: Point, spacing: float) -> Texture:
        counts = [int(np.ceil((h - lo) / spacing)) + 4 for lo, h in zip(low, high, strict=True)]
        nodes = rng.standard_normal((counts[2], counts[1], counts[0]), dtype=np.float32)
        # Mean square of the quadratic B-spline's weights, per axis, is 0.55 on average over the phase.
        return cls(nodes, (low[0] - spacing, low[1] - spacing, low[2] - spacing), spacing, 0.55**-1.5)

    def sample(self, grid: Grid) -> Array:
        """The field on a grid, (z, y, x), about unit variance."""
        value = self.nodes
        for axis, (coords, origin) in enumerate(zip((grid.z, grid.y, grid.x), self.origin[::-1], strict=True)):
            weights = self._weights(coords, origin, value.shape[axis])
            value = np.moveaxis(np.tensordot(weights, value, axes=(1, axis)), 0, axis)
        return np.ascontiguousarray(value) * np.float32(self.gain)

    def _weights(self, coords: Array, origin: float, count: int) -> Array:
        distance = np.abs((coords - np.float32(origin))[:, None] / self.spacing - np.arange(count, dtype=np.float32))
        inner = 0.75 - distance**2
        outer = 0.5 * (1.5 - distance) ** 2
        return np.where(distance < 0.5, inner, np.where(distance < 1.5, outer, 0.0)).astype(np.float32)
