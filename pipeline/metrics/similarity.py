"""Structural similarity on volumes (z, y, x): per slice, over the whole volume, and over scales, in one pass.

All three begin with the same blurred slices, so `similarities` makes these once. Sums run in float64; what is held is
one slice's moments and, for the 3-D index, those of eighteen slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.metrics.intensity import check

TAPS, SIGMA = 11, 1.5
"""The window of Wang et al. 2004: a Gaussian of 11 taps."""
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang, Simoncelli and Bovik 2003, section 3.2)."""


Plane = NDArray[np.float64]
Border = Literal["valid", "zero"]


@dataclass(frozen=True)
class Similarity:
    """Indices of one volume against another.

    Attributes:
        ssim: Mean of the 2-D index over slices.
        ssim_3d: Mean of the 3-D index; None where there are fewer than 11 slices.
        ms_ssim: Mean over slices of the multi-scale index.
        scales: Scales that ``ms_ssim`` used: five need a side of 161 voxels.
    """

    ssim: float
    ssim_3d: float | None
    ms_ssim: float
    scales: int


def similarities(prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float) -> Similarity:
    """Every index at once; see `ssim`, `ssim_3d` and `ms_ssim`.

    Raises:
        InputError: Slices of fewer than 11 voxels a side.
    """
    _require_sides(prediction, truth)
    weights = _scale_weights(truth)
    deep = _Depth(data_range) if len(truth) >= TAPS else None
    plain = multi = 0.0
    for k in range(len(truth)):
        p, t = _plane(prediction, k), _plane(truth, k)
        moments = _moments(p, t)
        index, contrast = _index(moments, data_range)
        plain += float(index.mean())
        multi += _over_scales(p, t, index, contrast, weights, data_range)
        if deep is not None:
            deep.add(moments)
    depth = len(truth)
    return Similarity(plain / depth, deep.mean() if deep is not None else None, multi / depth, len(weights))


def ssim(prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float, border: Border = "valid") -> float:
    """Mean over slices of local SSIM (Wang et al. 2004, eq. 13; K1 0.01, K2 0.03, Gaussian 11 taps, sigma 1.5).

    ``valid`` takes only positions whose whole window is inside the slice; ``zero`` takes all, the outside being 0
    (as RPLHR-CT's code does).

    Raises:
        InputError: Slices of fewer than 11 voxels a side.
    """
    _require_sides(prediction, truth)
    total = 0.0
    for k in range(len(truth)):
        index, _ = _index(_moments(_plane(prediction, k), _plane(truth, k), border), data_range)
        total += float(index.mean())
    return total / len(truth)


def ssim_3d(prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float) -> float:
    """Mean of SSIM under a window of 11 voxels a side, over positions whose whole window is inside the volume.

    Raises:
        InputError: Fewer than 11 voxels along an axis.
    """
    _require_sides(prediction, truth)
    if len(truth) < TAPS:
        raise _too_small(len(truth), 0)
    deep = _Depth(data_range)
    for k in range(len(truth)):
        deep.add(_moments(_plane(prediction, k), _plane(truth, k)))
    return deep.mean()


def ms_ssim(prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float) -> tuple[float, int]:
    """Mean over slices of multi-scale SSIM (Wang, Simoncelli and Bovik 2003, eq. 7), and the scales used.

    Five scales need a side of 161 voxels; smaller slices get fewer, with the exponents rescaled to the same sum.
    Negative factors count as 0, since a power of them is not real.

    Raises:
        InputError: Slices of fewer than 11 voxels a side.
    """
    _require_sides(prediction, truth)
    weights = _scale_weights(truth)
    total = 0.0
    for k in range(len(truth)):
        p, t = _plane(prediction, k), _plane(truth, k)
        total += _over_scales(p, t, *_index(_moments(p, t), data_range), weights, data_range)
    return total / len(truth), len(weights)


def gaussian_window() -> NDArray[np.float64]:
    """Normalised Gaussian of 11 taps, sigma 1.5."""
    x = np.arange(TAPS) - (TAPS - 1) / 2
    g = np.exp(-(x**2) / (2 * SIGMA**2))
    return np.asarray(g / g.sum())


def _band(outputs: int) -> NDArray[np.float64]:
    """(outputs + 10, outputs): the window as a matrix.

    In short pieces its zeros cost less than any other way to blur in float64 (three times as fast as SciPy's
    correlation on slices of 512x512).
    """
    matrix = np.zeros((outputs + TAPS - 1, outputs))
    for column in range(outputs):
        matrix[column : column + TAPS, column] = gaussian_window()
    return matrix


_BAND = _band(16)


class _Depth:
    """The 3-D index, fed with slices' moments: blurs them along depth, ``ROOM`` slices at a time."""

    ROOM = 8

    def __init__(self, data_range: float) -> None:
        self.data_range = data_range
        self.kept: NDArray[np.float64] | None = None
        self.filled = self.slices = 0
        self.total = 0.0

    def add(self, moments: NDArray[np.float64]) -> None:
        if self.kept is None:
            self.kept = np.empty((TAPS - 1 + self.ROOM, *moments.shape))
        self.kept[self.filled] = moments
        self.filled += 1
        if self.filled == len(self.kept):
            self._measure()

    def _measure(self) -> None:
        """The index at every slice whose window is there; the last ten slices stay for the next ones."""
        ready = self.filled - TAPS + 1
        if self.kept is None or ready <= 0:
            return
        columns = self.kept[: self.filled].reshape(self.filled, -1)
        blurred = (_BAND[: self.filled, :ready].T @ columns).reshape(ready, *self.kept.shape[1:])
        self.total += sum(float(_index(piece, self.data_range)[0].mean()) for piece in blurred)
        self.slices += ready
        for k in range(TAPS - 1):  # one by one: overlapping pieces would be copied aside first
            self.kept[k] = self.kept[ready + k]
        self.filled = TAPS - 1

    def mean(self) -> float:
        self._measure()
        return self.total / self.slices


def _moments(p: Plane, t: Plane, border: Border = "valid") -> NDArray[np.float64]:
    """Blurred p, t, p p, t t and p t of one slice, (5, y, x); ``valid`` leaves the half window at each border out."""
    planes = np.stack([p, t, p * p, t * t, p * t])
    if border == "zero":
        half = TAPS // 2
        planes = np.pad(planes, ((0, 0), (half, half), (half, half)))
    count, rows, columns = planes.shape
    height, width, step = rows - TAPS + 1, columns - TAPS + 1, _BAND.shape[1]
    tall = np.empty((count, height, columns))
    for y in range(0, height, step):
        n = min(step, height - y)
        np.matmul(_BAND[: n + TAPS - 1, :n].T, planes[:, y : y + n + TAPS - 1], out=tall[:, y : y + n])
    out = np.empty((count, height, width))
    lines, found = tall.reshape(-1, columns), out.reshape(-1, width)
    for x in range(0, width, step):
        n = min(step, width - x)
        found[:, x : x + n] = lines[:, x : x + n + TAPS - 1] @ _BAND[: n + TAPS - 1, :n]
    return out


def _index(moments: NDArray[np.float64], data_range: float) -> tuple[Plane, Plane]:
    """SSIM and its contrast-structure factor at every place."""
    mu_p, mu_t, square_p, square_t, product = moments
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    both, squares = mu_p * mu_t, mu_p**2 + mu_t**2
    contrast = (2 * (product - both) + c2) / (square_p + square_t - squares + c2)
    return (2 * both + c1) / (squares + c1) * contrast, contrast


def _over_scales(
    p: Plane, t: Plane, index: Plane, contrast: Plane, weights: NDArray[np.float64], data_range: float
) -> float:
    """Multi-scale SSIM of one slice, whose finest index and contrast are known."""
    value = 1.0
    for scale, weight in enumerate(weights):
        if scale:
            p, t = _halved(p), _halved(t)
            index, contrast = _index(_moments(p, t), data_range)
        factor = index if scale == len(weights) - 1 else contrast
        value *= max(0.0, float(factor.mean())) ** weight
    return value


def _scale_weights(truth: NDArray[Any]) -> NDArray[np.float64]:
    side = min(truth.shape[1:])
    scales = sum(1 for scale in range(len(MS_SSIM_WEIGHTS)) if side >> scale >= TAPS)
    weights = np.array(MS_SSIM_WEIGHTS[:scales])
    return np.asarray(weights * (sum(MS_SSIM_WEIGHTS) / weights.sum()))


def _halved(x: Plane) -> Plane:
    """2x2 means; an odd last row or column is left out."""
    x = x[: x.shape[0] // 2 * 2, : x.shape[1] // 2 * 2]
    return np.asarray((x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4)


def _plane(volume: NDArray[Any], k: int) -> Plane:
    return np.asarray(volume[k], dtype=np.float64)


def _require_sides(prediction: NDArray[Any], truth: NDArray[Any]) -> None:
    check(prediction, truth)
    for axis in (1, 2):
        if truth.shape[axis] < TAPS:
            raise _too_small(truth.shape[axis], axis)


def _too_small(length: int, axis: int) -> InputError:
    return InputError(
        f"{length} voxels along axis {axis}", expected=f"at least {TAPS} for SSIM", remedy="Use another metric."
    )
