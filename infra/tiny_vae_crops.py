"""What the tiny VAE is trained on: endless crops of phantoms at many pixel sizes, noise levels and windows."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pipeline.phantom import PhantomSettings, make_patient
from pipeline.volume import Window, resample_z

TRAINING_SEED = 1_000_000  # phantoms of users and tests have small seeds: training never sees them
SOFT_TISSUE = Window()
FIELDS = ((96, 320.0), (128, 320.0), (128, 320.0), (160, 320.0), (192, 320.0), (192, 240.0), (224, 320.0))
"""Matrix and field of view (mm) of the patients: pixels of 1.25 to 3.3 mm."""


class Crops:
    """Endless crops in [0, 1] from a pool of phantoms that is renewed one by one."""

    def __init__(self, seed: int, pool: int, draws_per_patient: int = 40) -> None:
        """``pool`` volumes at a time; after ``draws_per_patient`` draws a new patient takes the oldest one's place."""
        self.rng = np.random.default_rng(seed)
        self.pool, self.draws_per_patient = pool, draws_per_patient
        self.seed = TRAINING_SEED + 100_000 * seed
        self.volumes: list[NDArray[np.float32]] = []
        self.drawn = 0

    def _patient(self) -> list[NDArray[np.float32]]:
        """Thin, thick and thick-on-thin HU of a new patient at a random pixel size and noise level."""
        rng = self.rng
        self.seed += 1
        size, field = FIELDS[int(rng.integers(len(FIELDS)))]
        sigma = float(rng.choice([0.0, 5.0, 9.0, 9.0, 13.0]))
        settings = PhantomSettings(field_of_view_mm=field, thin_sigma_hu=sigma, thick_sigma_hu=sigma / 2)
        category = "APE" if rng.random() < 0.5 else "non-APE"
        p = make_patient(self.seed, size, int(rng.integers(40, 72)), category, settings)
        on_thin = resample_z(
            p.thick.hu,
            np.asarray(p.thick.geometry.z_mm),
            np.asarray(p.thin.geometry.z_mm),
            "cubic" if rng.random() < 0.5 else "linear",
        )
        keep = [p.thin.hu.astype(np.float32), on_thin]
        if p.thick.hu.shape[0] >= 8:
            keep.append(p.thick.hu.astype(np.float32))
        return keep

    def _window(self) -> Window:
        u = self.rng.random()
        if u < 0.72:
            return SOFT_TISSUE
        if u < 0.80:
            return Window.parse("maisi")
        if u < 0.88:
            return Window.parse("lung")
        return Window(float(self.rng.uniform(-150, 150)), float(self.rng.uniform(150, 1600)))

    def _geometry_patch(self, shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """Random plane cuts of random brightness with a little noise."""
        rng = self.rng
        axes = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
        image = np.full(shape, rng.random(), dtype=np.float32)
        for _ in range(int(rng.integers(1, 9))):
            normal = rng.standard_normal(3)
            normal /= np.linalg.norm(normal)
            plane = sum(n * a for n, a in zip(normal, axes, strict=True))
            image = np.where(plane > rng.uniform(-0.9, 0.9), np.float32(rng.random()), image)
        if rng.random() < 0.7:
            image = gaussian_filter(image, float(rng.uniform(0.3, 1.2)))
        noise = rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.04))
        return np.asarray(np.clip(image + noise, 0, 1), dtype=np.float32)

    def draw(self, voxels: float) -> torch.Tensor:
        """Two crops (2, 1, d, h, w) of about ``voxels`` each at most, every side a multiple of 4."""
        rng = self.rng
        if not self.volumes:
            while len(self.volumes) < self.pool:
                self.volumes += self._patient()
        elif self.drawn % self.draws_per_patient == 0:
            fresh = self._patient()
            self.volumes = self.volumes[len(fresh) :] + fresh
        self.drawn += 1
        volumes = [self.volumes[int(k)] for k in rng.choice(len(self.volumes), 2, replace=False)]
        limit = [min(v.shape[axis] for v in volumes) // 4 * 4 for axis in range(2)]
        depth = min(int(rng.choice([8, 12, 16, 24])), limit[0])
        side = min(int(math.sqrt(voxels / depth)) // 4 * 4, limit[1])
        return torch.from_numpy(np.stack([self._crop(v, (depth, side, side)) for v in volumes])[:, None])

    def _crop(self, volume: NDArray[np.float32], shape: tuple[int, int, int]) -> NDArray[np.float32]:
        """A random crop, flipped and windowed at random; plain geometry in place of an empty one."""
        rng = self.rng
        for _ in range(3):
            start = [int(rng.integers(n - s + 1)) for n, s in zip(volume.shape, shape, strict=True)]
            crop = volume[tuple(slice(o, o + s) for o, s in zip(start, shape, strict=True))]
            if crop.std() > 100:
                break
        for axis in range(3):
            crop = np.flip(crop, axis) if rng.random() < 0.5 else crop
        crop = crop.swapaxes(1, 2) if rng.random() < 0.5 else crop
        unit = (self._window().to_unit(np.ascontiguousarray(crop)) + 1) / 2
        return self._geometry_patch(shape) if unit.std() < 0.02 or rng.random() < 0.02 else unit
