"""Noise of a reconstructed CT slice: correlated in-plane by the kernel, white from slice to slice."""

from __future__ import annotations

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
