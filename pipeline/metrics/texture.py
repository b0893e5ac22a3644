"""Noise texture of thin slices in ker A: its power by tissue, and noise that gives an answer what it lacks of it.

A decoder that gives a slab of 4 x 4 x 4 voxels four numbers cannot carry the noise of a thin slice, and a mean shows
none. Measures that feel noise (LAA-950, texture features) then differ between such slices and true ones. The noise
itself is gone; its power is not: how much true thin slices have is measured on a run's own pairs, by tissue and along z
by frequency, and an answer is given what it lacks of it, drawn in ker A, so that it agrees with the thick slices as
before.

Noise is measured where the smoothed volume is even, so that it is no anatomy, and in the finest band of the slice,
v - G v with a Gaussian G of one pixel. Wider bands were tried: on phantoms they hold anatomy that the answer
lacks, and noise in its place made the answer too rough. Frequencies count in pixels and slices, so the figures belong
to series of about one pixel size and one kernel.

Where the volume changes along z, what is in ker A is anatomy, and a draw has too little of it: a share that hardly
differs from patient to patient, and is measured on held-out pairs by how steep the place is. There N x is enlarged by
that share. Of all maps that give an answer the power of the truth, such a gain adds the least error (Freirich, Michaeli
and Meir 2021, "A theory of the distortion-perception tradeoff in Wasserstein space", for Gaussians).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.optimize import nnls

from latentcache import InputError
from pipeline.forward_model import SliceOperator
from pipeline.metrics.null_space import null_projector
from pipeline.volume import row_blocks

TISSUE_EDGES_HU = (-960.0, -500.0, -20.0, 130.0)
"""Between air, lung, fat, soft tissue and what is brighter, in the smoothed volume."""
TISSUES = len(TISSUE_EDGES_HU) + 1
BANDS = 2
"""Along z: the second difference, and the rest of ker A."""
EVEN_HU_PER_PIXEL = 8.0
"""Slope in the smoothed volume below which a place shows noise, not anatomy."""
SMOOTHING_PIXELS, SMOOTHING_SLICES = 1.5, 2.0
FINE_PIXELS = 1.0
"""Of the Gaussian that is taken away in the slice."""
STEEP_HU_PER_SLICE = (4.0, 12.0, 30.0)
"""Slope of the smoothed volume along z, between kinds of places; the flattest gets noise alone."""
KINDS = len(STEEP_HU_PER_SLICE) + 1
MOST_GAIN = 1.5
"""Of detail in ker A: what a draw lacks more of, it does not have."""
HALO = 8
"""Rows on both sides that a row's tissue and noise depend on: four times the wider Gaussian, and its slope."""
LEAST_VOXELS = 2000
"""A tissue with fewer even voxels is not known."""
MOST_VOXELS = 1 << 24
"""Measured in a volume, in blocks of rows spread over it."""
MOST_MEAN = 0.05
"""A slice of which N keeps more of a constant is beyond the thick slices: anatomy is in ker A there."""
Map = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Power:
    """Mean square in HU^2 by class and band, (classes, BANDS), 0 in classes without voxels, and the voxels of each."""

    power: NDArray[np.float64]
    voxels: NDArray[np.int64]

    def __add__(self, other: Self) -> Self:
        """Of both volumes' voxels together."""
        voxels = self.voxels + other.voxels
        total = self.power * self.voxels[:, None] + other.power * other.voxels[:, None]
        return type(self)(total / np.maximum(voxels, 1)[:, None], voxels)


class TexturePower(_Power):
    """Power of the fine part of N x in even places, by tissue."""

    @classmethod
    def of(cls, hu: NDArray[np.generic], operator: SliceOperator) -> TexturePower:
        """Measure a volume (z, y, x) HU on the operator's thin positions."""
        total, voxels = np.zeros((TISSUES, BANDS)), np.zeros(TISSUES, np.int64)
        within = np.abs(null_projector(operator).sum(axis=1)) < MOST_MEAN
        along_z = _along_z(operator)
        blocks = list(row_blocks(hu.shape[1]))
        for rows in blocks[:: max(1, hu.size // MOST_VOXELS)]:
            wide, own = _with_halo(rows, hu.shape[1])
            block = np.asarray(hu[:, wide], np.float32)
            smooth = _smooth(block)
            slope = np.hypot(np.gradient(smooth, axis=1), np.gradient(smooth, axis=2))
            counted = ((slope < EVEN_HU_PER_PIXEL) & within[:, None, None])[:, own]
            tissue = _tissue(smooth)[:, own][counted]
            voxels += np.bincount(tissue, minlength=TISSUES)
            fine = _fine(block)
            for band, part in enumerate(along_z):
                seen = np.tensordot(part, fine[:, own], 1)[counted]
                total[:, band] += np.bincount(tissue, np.square(seen, dtype=np.float64), TISSUES)
        return cls(total / np.maximum(voxels, 1)[:, None], voxels)


class DetailPower(_Power):
    """Power of N x by how steep a place is along z, (KINDS, BANDS)."""

    @classmethod
    def of(cls, hu: NDArray[np.generic], operator: SliceOperator) -> DetailPower:
        """Measure a volume (z, y, x) HU on the operator's thin positions."""
        total, voxels = np.zeros((KINDS, BANDS)), np.zeros(KINDS, np.int64)
        within = np.abs(null_projector(operator).sum(axis=1)) < MOST_MEAN
        along_z = [part[within] for part in _along_z(operator)]
        for rows in row_blocks(hu.shape[1]):
            wide, own = _with_halo(rows, hu.shape[1])
            block = np.asarray(hu[:, wide], np.float32)
            kind = _kind(_smooth(block))[within][:, own].ravel()
            voxels += np.bincount(kind, minlength=KINDS)
            for band, part in enumerate(along_z):
                seen = np.tensordot(part, block[:, own], 1).ravel()
                total[:, band] += np.bincount(kind, np.square(seen, dtype=np.float64), KINDS)
        return cls(total / np.maximum(voxels, 1)[:, None], voxels)


@dataclass(frozen=True, eq=False)
class Texture:
    """Of a run's true thin slices: the power of their noise, and by how much its draws fall short of their detail.

    Attributes:
        noise: Measured when the run began.
        gain: (KINDS, BANDS) factors of N x, 1 or more; ones until the run's draws were measured.
    """

    noise: TexturePower
    gain: NDArray[np.float64]

    @classmethod
    def of_noise(cls, noise: TexturePower) -> Texture:
        return cls(noise, np.ones((KINDS, BANDS)))

    def with_detail(self, truth: DetailPower, draws: DetailPower) -> Texture:
        """The same with the gain that brings draws to the truth's power on the same pairs."""
        gain = np.sqrt(truth.power / np.maximum(draws.power, 1e-6))
        gain[np.minimum(truth.voxels, draws.voxels) < LEAST_VOXELS] = 1
        gain[0] = 1
        return Texture(self.noise, np.clip(gain, 1, MOST_GAIN))

    def to_json(self) -> str:
        noise = {"power": np.round(self.noise.power, 4).tolist(), "voxels": self.noise.voxels.tolist()}
        return json.dumps({**noise, "detail_gain": np.round(self.gain, 4).tolist()})

    @classmethod
    def from_json(cls, text: str) -> Texture:
        """Read what ``to_json`` wrote.

        Raises:
            InputError: Another text, or another division into tissues, kinds of places and bands.
        """
        try:
            found = json.loads(text)
            power, gain = (np.array(found[name], np.float64) for name in ("power", "detail_gain"))
            voxels = np.array(found["voxels"], np.int64)
        except (ValueError, KeyError, TypeError):
            power = gain = np.zeros((0, 0))
            voxels = np.zeros(0, np.int64)
        sound = power.shape == (TISSUES, BANDS) and voxels.shape == (TISSUES,) and gain.shape == (KINDS, BANDS)
        sound = sound and bool(np.isfinite(power).all() and power.min() >= 0 and voxels.min() >= 0)
        if not sound or not ((gain >= 1) & (gain <= MOST_GAIN)).all():
            raise InputError(
                "a texture that is damaged or of another version",
                expected=f"power of {TISSUES} tissues in {BANDS} bands, finite and not negative, their voxels, and "
                f"gains of {KINDS} kinds of places from 1 to {MOST_GAIN}",
                remedy="Remove texture.json from the run: its samples then keep the texture that the model gives them.",
            )
        return cls(TexturePower(power, voxels), gain)


def enlarged_detail(
    hu: NDArray[np.generic], gain: NDArray[np.float64], operator: SliceOperator
) -> Iterator[tuple[slice, Map]]:
    """Yield the addition that a gain of the detail in ker A makes to a volume (z, y, x) HU, as rows and their part."""
    if (gain == 1).all():
        return
    projector, along_z = null_projector(operator).astype(np.float32), _along_z(operator)
    for rows in row_blocks(hu.shape[1]):
        wide, own = _with_halo(rows, hu.shape[1])
        block = np.asarray(hu[:, wide], np.float32)
        kind = _kind(_smooth(block))[:, own]
        more = np.zeros(kind.shape, np.float32)
        for band, part in enumerate(along_z):
            more += (gain[:, band] - 1).astype(np.float32)[kind] * np.tensordot(part, block[:, own], 1)
        yield rows, np.tensordot(projector, more, 1)


def lacking(wanted: TexturePower, found: TexturePower, operator: SliceOperator) -> NDArray[np.float64]:
    """(TISSUES, BANDS) amplitudes in HU of white noise that bring a volume from one power to the other.

    A tissue that either does not know gets none, nor does a band that has its power. Non-negative least squares, since
    the bands overlap and noise of one shows in the other.
    """
    projector, along_z = null_projector(operator), _along_z(operator)
    within = np.abs(projector.sum(axis=1)) < MOST_MEAN
    response = np.array(
        [[np.square(seen @ projector @ drawn)[within].sum(axis=1).mean() for drawn in along_z] for seen in along_z]
    )
    response *= np.mean(np.square(_gain()))
    out = np.zeros((TISSUES, BANDS))
    for tissue in np.flatnonzero((wanted.voxels >= LEAST_VOXELS) & (found.voxels >= LEAST_VOXELS)):
        missing = np.maximum(wanted.power[tissue] - found.power[tissue], 0)
        # A fifth too much of a weak band is as wrong as of a strong one.
        scale = 1 / np.maximum(wanted.power[tissue], 1e-3)
        out[tissue] = np.sqrt(nnls(response * scale[:, None], missing * scale)[0])
    return out


def drawn_texture(
    hu: NDArray[np.generic], amplitudes: NDArray[np.float64], operator: SliceOperator, seed: int
) -> Iterator[tuple[slice, Map]]:
    """Noise in ker A for a volume (z, y, x) HU, as rows and their part; the same for the same seed, however blocked."""
    height = hu.shape[1]
    projector = null_projector(operator).astype(np.float32)
    along_z = _along_z(operator)
    for rows in row_blocks(height):
        wide, own = _with_halo(rows, height)
        tissue = _tissue(_smooth(np.asarray(hu[:, wide], np.float32)))[:, own]
        noise = np.zeros(tissue.shape, np.float32)
        for band, part in enumerate(along_z):
            if not amplitudes[:, band].any():
                continue
            white = np.stack([_white(seed, band, row, hu) for row in range(wide.start, wide.stop)], axis=1)
            noise += amplitudes[:, band].astype(np.float32)[tissue] * np.tensordot(part, _fine(white)[:, own], 1)
        yield rows, np.tensordot(projector, noise, 1)


def _white(seed: int, band: int, row: int, hu: NDArray[np.generic]) -> Map:
    """(z, x) independent standard normal numbers of an image row, whichever block it is drawn in."""
    return np.random.default_rng([seed, band, row]).standard_normal((hu.shape[0], hu.shape[2]), np.float32)


def _with_halo(rows: slice, height: int) -> tuple[slice, slice]:
    """The rows with their neighbours, and where the rows are among them."""
    low, high = max(0, rows.start - HALO), min(height, rows.stop + HALO)
    return slice(low, high), slice(rows.start - low, rows.stop - low)


def _smooth(hu: Map) -> Map:
    sigmas = (SMOOTHING_SLICES, SMOOTHING_PIXELS, SMOOTHING_PIXELS)
    return np.asarray(gaussian_filter(hu, sigmas, mode="nearest"), np.float32)


def _kind(smooth: Map) -> NDArray[np.int64]:
    """(z, y, x) number of a voxel's kind, by how steep the smoothed volume is along z."""
    return np.asarray(np.digitize(np.abs(np.gradient(smooth, axis=0)), STEEP_HU_PER_SLICE))


def _tissue(smooth: Map) -> NDArray[np.int64]:
    """(z, y, x) number of a voxel's tissue, from the smoothed volume."""
    return np.asarray(np.digitize(smooth, TISSUE_EDGES_HU))


def _along_z(operator: SliceOperator) -> tuple[Map, Map]:
    """N split by frequency along z, (n, n) each: the second difference, and the rest."""
    projector = null_projector(operator)
    ends = np.pad(projector, ((1, 1), (0, 0)), mode="edge")
    slow = (ends[:-2] + 2 * projector + ends[2:]) / 4
    return (projector - slow).astype(np.float32), slow.astype(np.float32)


def _fine(volume: Map) -> Map:
    """The finest band of every slice."""
    wide = volume
    for axis in (1, 2):
        wide = gaussian_filter1d(wide, FINE_PIXELS, axis=axis, mode="nearest")
    return volume - wide


def _gain() -> NDArray[np.float64]:
    """Squared transfer function of the finest band."""
    impulse = np.zeros((1, 64, 64), np.float32)
    impulse[0, 32, 32] = 1
    return np.asarray(np.abs(np.fft.fft2(_fine(impulse)[0].astype(np.float64))) ** 2)
