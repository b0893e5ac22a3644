"""Interpolation along z by physical position: the baselines, the pixel-mode condition and the restored HU."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

ZMethod = Literal["nearest", "linear", "cubic", "lanczos"]


def z_weights(z_from: NDArray[Any], z_to: NDArray[Any], method: ZMethod = "linear") -> NDArray[np.float64]:
    """Matrix (len(z_to), len(z_from)) that interpolates along z; positions in mm, ``z_from`` ascending.

    Outside the sampled range the end values are held (edge extension). ``cubic`` is the not-a-knot cubic spline,
    ``lanczos`` the windowed sinc of order 3 on the mean spacing, normalised to sum to 1.
    """
    src = np.asarray(z_from, dtype=np.float64)
    dst = np.clip(np.asarray(z_to, dtype=np.float64), src[0], src[-1])
    n = len(src)
    if n == 1:
        return np.ones((len(dst), 1))
    if method == "nearest":
        return np.asarray(np.eye(n)[np.abs(dst[:, None] - src[None, :]).argmin(axis=1)], dtype=np.float64)
    if method == "linear":
        upper = np.clip(np.searchsorted(src, dst, side="right"), 1, n - 1)
        t = (dst - src[upper - 1]) / (src[upper] - src[upper - 1])
        weights = np.zeros((len(dst), n))
        rows = np.arange(len(dst))
        weights[rows, upper - 1] = 1 - t
        weights[rows, upper] = t
        return weights
    if method == "cubic":
        return np.asarray(CubicSpline(src, np.eye(n), axis=0)(dst)) if n > 2 else z_weights(src, dst, "linear")
    u = (dst[:, None] - src[None, :]) / float(np.mean(np.diff(src)))
    kernel = np.where(np.abs(u) < 3, np.sinc(u) * np.sinc(u / 3), 0.0)
    # Edge extension for the kernel's support: weight that falls outside goes to the end samples.
    step = float(np.mean(np.diff(src)))
    for side, index in ((-1, 0), (1, n - 1)):
        for k in (1, 2, 3):
            v = (dst - (src[index] + side * k * step)) / step
            kernel[:, index] += np.where(np.abs(v) < 3, np.sinc(v) * np.sinc(v / 3), 0.0)
    return np.asarray(kernel / kernel.sum(axis=1, keepdims=True))


def resample_z(
    volume: NDArray[Any], z_from: NDArray[Any], z_to: NDArray[Any], method: ZMethod = "linear"
) -> NDArray[np.float32]:
    """Interpolate a volume (z, y, x) from slice positions ``z_from`` to ``z_to``; returns float32 in the same units."""
    weights = z_weights(z_from, z_to, method).astype(np.float32)
    flat = np.ascontiguousarray(volume, dtype=np.float32).reshape(len(volume), -1)
    return (weights @ flat).reshape(len(weights), *volume.shape[1:])
