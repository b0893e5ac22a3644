"""Image metrics on HU volumes (z, y, x), each with a stated range and mask. Bad input raises, never averages away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, correlate1d

from latentcache.errors import InputError, NonFiniteError

TISSUE_CLASSES_HU: Mapping[str, tuple[float, float]] = {
    "lung": (-950.0, -700.0),
    "fat": (-120.0, -60.0),
    "soft_tissue": (0.0, 80.0),
    "contrast": (150.0, 400.0),
    "bone": (400.0, 3000.0),
}
"""Tissue classes by the true HU, in the ranges that radiology texts give; classes leave gaps on purpose."""


def _checked(
    prediction: NDArray[Any], truth: NDArray[Any], mask: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The voxels to compare, flattened, as float64."""
    if prediction.shape != truth.shape:
        raise InputError(
            f"prediction of shape {prediction.shape} against truth of shape {truth.shape}",
            expected="equal shapes (z, y, x)",
            remedy="Resample onto the truth's grid first; nothing is cropped or stretched silently.",
        )
    if mask is not None:
        if not mask.any():
            raise InputError("an empty mask", expected="at least one voxel", remedy="Check the mask's threshold.")
        prediction, truth = prediction[mask], truth[mask]
    p, t = prediction.astype(np.float64), truth.astype(np.float64)
    for name, values in (("prediction", p), ("truth", t)):
        bad = int(values.size - np.count_nonzero(np.isfinite(values)))
        if bad:
            raise NonFiniteError(
                f"{bad} non-finite voxels in the {name}", expected="finite HU", remedy="Find the stage that made them."
            )
    return p, t


def psnr(
    prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float, mask: NDArray[np.bool_] | None = None
) -> float:
    """Peak signal-to-noise ratio, 10 log10(range^2 / MSE), in dB; ``inf`` for identical volumes."""
    p, t = _checked(prediction, truth, mask)
    mse = float(np.mean((p - t) ** 2))
    return float("inf") if mse == 0 else float(10 * np.log10(data_range**2 / mse))


def mean_absolute_error(prediction: NDArray[Any], truth: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> float:
    """Mean of |prediction - truth|, in HU."""
    p, t = _checked(prediction, truth, mask)
    return float(np.mean(np.abs(p - t)))


def gaussian_window(size: int = 11, sigma: float = 1.5) -> NDArray[np.float64]:
    """Normalised 1-D Gaussian of Wang et al. 2004 (SSIM)."""
    x = np.arange(size) - (size - 1) / 2
    g = np.exp(-(x**2) / (2 * sigma**2))
    return np.asarray(g / g.sum())


def ssim_map(
    prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float, axes: tuple[int, ...] = (1, 2)
) -> NDArray[np.float64]:
    """Local SSIM (Wang et al. 2004, eq. 13; K1 0.01, K2 0.03, Gaussian 11 taps, sigma 1.5) along ``axes``.

    ``axes=(1, 2)`` gives the 2-D index per slice, ``(0, 1, 2)`` the 3-D one. Only positions whose whole window lies
    inside the volume are returned.
    """
    p, t = _checked(prediction, truth)
    kernel = gaussian_window()
    for axis in axes:
        if p.shape[axis] < len(kernel):
            raise InputError(
                f"{p.shape[axis]} voxels along axis {axis}",
                expected="at least 11 for SSIM",
                remedy="Use another metric.",
            )

    def blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in axes:
            x = correlate1d(x, kernel, axis=axis, mode="reflect")
        return x

    mu_p, mu_t = blur(p), blur(t)
    var_p, var_t = blur(p * p) - mu_p**2, blur(t * t) - mu_t**2
    cov = blur(p * t) - mu_p * mu_t
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    index = ((2 * mu_p * mu_t + c1) * (2 * cov + c2)) / ((mu_p**2 + mu_t**2 + c1) * (var_p + var_t + c2))
    pad = len(kernel) // 2
    inner = tuple(slice(pad, -pad) if axis in axes else slice(None) for axis in range(3))
    return np.asarray(index[inner])


def ssim(prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float, axes: tuple[int, ...] = (1, 2)) -> float:
    """Mean SSIM; see ``ssim_map``. Slices are taken one by one for the 2-D index, so that memory stays small."""
    if axes == (1, 2) and prediction.shape == truth.shape:
        pairs = zip(prediction, truth, strict=True)
        return float(np.mean([ssim_map(p[None], t[None], data_range=data_range).mean() for p, t in pairs]))
    return float(ssim_map(prediction, truth, data_range=data_range, axes=axes).mean())


def bias_by_tissue(prediction: NDArray[Any], truth: NDArray[Any], *, erode: int = 1) -> dict[str, dict[str, float]]:
    """Mean signed and absolute error in HU by tissue class of the truth, inside classes eroded by ``erode`` voxels.

    Classes with fewer than 100 voxels after erosion are left out.
    """
    _checked(prediction, truth)
    error = prediction.astype(np.float32) - truth.astype(np.float32)
    out: dict[str, dict[str, float]] = {}
    for name, (low, high) in TISSUE_CLASSES_HU.items():
        inside = (truth >= low) & (truth < high)
        if erode:
            inside = binary_erosion(inside, iterations=erode)
        count = int(inside.sum())
        if count >= 100:
            chosen = error[inside].astype(np.float64)
            out[name] = {"bias_hu": float(chosen.mean()), "mae_hu": float(np.abs(chosen).mean()), "voxels": count}
    return out
