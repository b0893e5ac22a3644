"""Interpolation along z by physical position: the baselines, the pixel-mode condition and the restored HU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline

from latentcache import linear_neighbours
from pipeline.volume.geometry import Geometry
from pipeline.volume.volume import Volume


def interpolated_onto(thick: Volume, thin_z_mm: NDArray[np.float64], method: ZMethod) -> NDArray[np.float32]:
    """Return thick HU at positions along z in mm, (z, y, x), kept within each column's measured range."""
    weights = z_weights(np.asarray(thick.geometry.z_mm), thin_z_mm, method).astype(np.float32)
    out = np.empty((len(weights), *thick.hu.shape[1:]), dtype=np.float32)
    for rows in row_blocks(thick.hu.shape[1]):
        y = np.ascontiguousarray(thick.hu[:, rows], dtype=np.float32)
        block = (weights @ y.reshape(len(y), -1)).reshape(len(weights), *y.shape[1:])
        # A cubic overshoots at bone and air; what no slice measured is not restored.
        out[:, rows] = np.clip(block, y.min(axis=0), y.max(axis=0))
    return out


def interpolated(thick: Volume, target: Geometry, method: ZMethod) -> NDArray[np.float32]:
    """Thick HU on the target's slice positions, (z, y, x) float32, kept within each column's measured range."""
    return interpolated_onto(thick, np.asarray(target.z_mm), method)


ROW_BLOCK = 32
"""Image rows worked on at a time, to bound memory."""


def row_blocks(n_rows: int) -> Iterator[slice]:
    """Slices over image rows, ``ROW_BLOCK`` at a time."""
    for start in range(0, n_rows, ROW_BLOCK):
        yield slice(start, min(start + ROW_BLOCK, n_rows))


UNEVEN_FLAG = "variable-spacing"
RESAMPLED_FLAG = "resampled-along-z"


def even_geometry(geometry: Geometry) -> Geometry:
    """The grid between the same first and last position whose spacing is nearest to the median one."""
    z = np.asarray(geometry.z_mm)
    count = max(1, round(float((z[-1] - z[0]) / np.median(np.diff(z)))))
    return geometry.with_z(list(np.linspace(z[0], z[-1], count + 1)))


def on_even_positions(volume: Volume) -> Volume:
    """A volume on `even_geometry`: float32 HU, flagged, each slice under the UID of the nearest measured one."""
    own, even = volume.geometry, even_geometry(volume.geometry)
    z, wanted = np.asarray(own.z_mm), np.asarray(even.z_mm)
    uids = volume.header.sop_instance_uids
    nearest = np.abs(wanted[:, None] - z[None, :]).argmin(axis=1)
    header = replace(volume.header, sop_instance_uids=tuple(uids[i] for i in nearest) if uids else ())
    hu = resample_z(volume.hu, z, wanted)
    return replace(volume, hu=hu, geometry=even, header=header, flags=(*volume.flags, RESAMPLED_FLAG))


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
        lower, upper, t = linear_neighbours(src, dst)
        weights = np.zeros((len(dst), n))
        rows = np.arange(len(dst))
        weights[rows, lower] = 1 - t
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
