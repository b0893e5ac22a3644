"""Draw thick slices for a thin series, as scanners make them: profile, spacing, overlap, phase, noise, kernel."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model.slice_profile import SliceProfile, slice_operator
from pipeline.volume import Geometry, SimulatedThick

FWHM_MM = (3.0, 7.5)
"""Slice thicknesses that are drawn around the wanted one, at most."""
WIDTH_SPREAD = (0.8, 1.35)
"""Measured width over nominal thickness: 5 mm measure 5.0 to 6.7 mm by scanner."""
OVERLAP = (0.6, 1.0)
"""Spacing over thickness where slices overlap; every other series abuts."""
BLUR = (0.2, 0.5)
"""Blur of a blurred box, in its widths."""
NOISE_HU = (2.0, 8.0)
"""Noise of a thick slice at its dose."""
OTHER_KERNEL = 0.4
"""Share of thick series that were reconstructed by another kernel than the thin one."""
SOFTER = 0.7
"""Share of those whose kernel is softer, as thick series' are as a rule: a blur, else an unsharp mask."""
BLUR_MM, SHARP_MM, SHARPENING = (0.3, 0.7), 0.6, (0.2, 0.6)
MIN_SLICES = 3
MIN_WEIGHT = 1e-4


def draw_thick(thin: Geometry, thickness_mm: float, key: str, thin_noise_hu: float = 0.0) -> SimulatedThick | None:
    """A thick series of about ``thickness_mm`` that the thin one allows, the same for the same key; None if too short.

    Args:
        thin: Grid of the thin series.
        key: Of the thin series: seeds the draw.
        thin_noise_hu: Of the thin slices; what is left of it after averaging counts towards the noise wanted.
    """
    digest = hashlib.sha256(f"thick {thickness_mm} {key}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    profile = drawn_profile(rng, thickness_mm)
    spacing = thickness_mm * (1.0 if rng.random() < 0.5 else float(rng.uniform(*OVERLAP)))
    low, high = thin.z_mm[0] + profile.fwhm_mm / 2, thin.z_mm[-1] - profile.fwhm_mm / 2
    z = np.arange(low + rng.random() * spacing, high + 1e-9, spacing)
    if len(z) < MIN_SLICES:
        return None
    without = thick_under(profile, z, thin, thickness_mm)
    kept = thin_noise_hu * float(np.sqrt(np.mean([np.square(row).sum() for row in without.weights])))
    wanted = float(rng.uniform(*NOISE_HU))
    added = float(np.sqrt(max(0.0, wanted**2 - kept**2)))
    seed = int(rng.integers(2**31))
    pixels, gain = drawn_kernel(rng, thin.spacing_mm_zyx[1])
    return replace(without, noise_hu=round(added, 3), seed=seed, kernel_pixels=pixels, kernel_gain=gain)


def drawn_kernel(rng: np.random.Generator, pixel_mm: float) -> tuple[float, float]:
    """Width in pixels and gain of `SimulatedThick`'s kernel; (0, 0) where both series share one."""
    other, softer = rng.random() < OTHER_KERNEL, rng.random() < SOFTER
    if not other:
        return 0.0, 0.0
    if softer:
        return round(float(rng.uniform(*BLUR_MM)) / pixel_mm, 3), -1.0
    return round(SHARP_MM / pixel_mm, 3), round(float(rng.uniform(*SHARPENING)), 3)


def thick_under(
    profile: SliceProfile, thick_z_mm: NDArray[np.float64], thin: Geometry, thickness_mm: float
) -> SimulatedThick:
    """The thick series that a profile makes of a thin one at positions (K,) mm, without added noise."""
    matrix = slice_operator(profile, thick_z_mm, np.asarray(thin.z_mm)).matrix.copy()
    matrix[matrix < MIN_WEIGHT] = 0
    matrix /= matrix.sum(axis=1, keepdims=True)
    spans = [np.flatnonzero(row)[[0, -1]] for row in matrix]
    return SimulatedThick(
        profile=str(profile),
        thickness_mm=thickness_mm,
        z_mm=tuple(float(v) for v in thick_z_mm),
        first=tuple(int(low) for low, _ in spans),
        weights=tuple(
            tuple(round(float(v), 7) for v in row[low : high + 1])
            for row, (low, high) in zip(matrix, spans, strict=True)
        ),
    )


def drawn_profile(rng: np.random.Generator, thickness_mm: float) -> SliceProfile:
    """A box, a Gaussian or a blurred box, its width 3 to 7.5 mm."""
    width = float(np.clip(thickness_mm * rng.uniform(*WIDTH_SPREAD), *FWHM_MM))
    kind = rng.integers(3)
    if kind == 1:
        return SliceProfile("gaussian", width)
    return SliceProfile("box", width, blur_mm=width * float(rng.uniform(*BLUR)) if kind == 2 else 0.0)
