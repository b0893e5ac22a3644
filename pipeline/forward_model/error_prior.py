"""Prior error of each voxel of an answer, before the thick slices are looked at: the weights of data consistency.

Outside the window no network has spoken: x there is interpolation, wrong by hundreds of HU beside an edge along z and
by nothing where the thick slices do not change. Inside it is a network's answer, mostly better by far. So

    sigma = h             outside the window, h = BASE_HU + SHARE * (change between the neighbouring thick slices)
    sigma = inside * h    inside,

and a voxel that the answer puts beyond the window stays there, give or take SLACK * inside * h: without that bound,
what interpolation misses beside a good answer is paid for by voxels that the correction drags into the window.

The residual of an answer shows how good it is. Deep inside the window, where h is largest,

    RMS(A x - y)^2 = noise^2 + c^2 a H R H a^T

gives c: 0.35 to 0.37 for cubic interpolation of a phantom, 0.26 to 0.28 for an answer 4 dB above it, 0.13 to 0.16 for
one 9 dB above, 0.05 to 0.06 for the truth, whose residual is the noise. ``inside`` is c^2, not c: where a slice holds
both kinds of voxel, those outside miss by more than h, so the answer deserves less of the blame. Where h says nothing,
in even slices, what exceeds the noise is a bias or a blur of the network's own: it is added to sigma, on either side of
the edge apart.

Measured on phantoms of seeds 1 to 3 (160 x 160, 100 thin slices, profile and noise of another phantom), on answers from
26 to 58 dB in 40/400 HU (the truth plus shares of cubic's error, or plus smooth or white noise of 6 and 12 HU): it
loses 0.08 dB at most, on the truth itself, and gains up to 1.5. With ``inside`` at a tenth for all of them 0.3 dB are
lost at 35 dB, 1 at 40 and 6 to 9 on the truth; with h inside as well as outside 3, 6 and 22. Nothing is claimed of
answers below 26 dB, of errors that are coherent over many slices, or of other windows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pipeline.forward_model.column_solver import hat_correlation
from pipeline.forward_model.thick_measurement import ThickMeasurement
from pipeline.volume import Window

BASE_HU = 3.0
"""Error of interpolation where neighbouring thick slices are equal."""
SHARE = 0.3
"""Error of interpolation over the largest step between the thick slices about a voxel."""
SLACK = 3.0
"""Depth to which a voxel beyond the window may come into it, in sigma of a voxel inside."""
DEEP_HU = 30.0
"""An answer closer than this to the window's edge may be of a voxel beyond it, and tells nothing of how good it is."""
STEEP, EVEN = 0.8, 0.5
"""Slices above this quantile of a H R H a^T tell of ``inside``, those below the other of ``flat_hu``."""
MIN_TOLD = 100
"""Residuals below which nothing is estimated."""
UNTOLD = 0.09
"""``inside`` where nothing is estimated: as for an answer about as good as interpolation."""
MAX_COLUMNS = 10_000
"""Columns that an estimate looks at."""


class Errors(NamedTuple):
    """Of some columns, in HU: sigma (N, C), and the least and largest x may become, (N, C) or one number."""

    sigma: NDArray[np.float32]
    low: NDArray[np.float32] | np.float32
    high: NDArray[np.float32] | np.float32


@dataclass(frozen=True)
class ErrorPrior:
    """Sigma and bounds of x for any block of columns.

    Attributes:
        window: Where a network has answered.
        inside: sigma over h inside the window.
        flat_hu: What is added to sigma inside the window and outside it, from the misfit of even slices.
        floor_hu: Least HU that there is.
        between: (N, K - 1): from steps between covered thick slices to each thin slice.
    """

    window: Window
    inside: float
    flat_hu: tuple[float, float]
    floor_hu: float
    between: sparse.csr_matrix

    def of(self, x: NDArray[np.float32], step: NDArray[np.float32]) -> Errors:
        """Sigma and bounds of columns x (N, C) HU, given the covered slices' ``steps``; x itself keeps the bounds."""
        h = self.interpolation_error(step, len(x))
        below, above = x <= np.float32(self.window.lower), x >= np.float32(self.window.upper)
        own = h * np.float32(self.inside)
        flat_inside, flat_outside = (np.float32(v) for v in self.flat_hu)
        sigma = np.where(below | above, h + flat_outside, own + flat_inside)
        own *= np.float32(SLACK)
        high = np.where(below, own + np.float32(self.window.lower), np.float32(np.inf))
        np.subtract(np.float32(self.window.upper), own, out=own)
        np.maximum(own, np.float32(self.floor_hu), out=own)
        return Errors(sigma, np.where(above, own, np.float32(self.floor_hu)), high)

    def interpolation_error(self, step: NDArray[np.float32], n_thin: int) -> NDArray[np.float32]:
        """h, (N, C) HU."""
        if not len(step):
            return np.full((n_thin, step.shape[1]), BASE_HU, np.float32)
        h = self.between @ (step * np.float32(SHARE))
        h += np.float32(BASE_HU)
        return np.asarray(h)


def error_prior(
    x: NDArray[np.float32], measured: ThickMeasurement, window: Window, floor_hu: float = -np.inf
) -> ErrorPrior:
    """The prior of an answer x (N, y, x) HU, its quality estimated from its residual."""
    between = sparse.csr_matrix(_between(measured.thick_z_mm[measured.operator.covered], measured.thin_z_mm))
    prior = ErrorPrior(window, UNTOLD, (0.0, 0.0), floor_hu, between)
    return _told(x, measured, prior)


def steps(thick: NDArray[np.float32]) -> NDArray[np.float32]:
    """(K, C) HU to (K - 1, C): the largest change between neighbours among three intervals, the middle one's own."""
    step = np.abs(np.diff(thick, axis=0))
    wide = step.copy()
    np.maximum(wide[1:], step[:-1], out=wide[1:])
    np.maximum(wide[:-1], step[1:], out=wide[:-1])
    return np.asarray(wide)


def _between(thick_z_mm: NDArray[np.float64], thin_z_mm: NDArray[np.float64]) -> NDArray[np.float32]:
    """Linear interpolation from the intervals' middles to the thin slices, (N, K - 1), constant beyond the ends."""
    middle = (thick_z_mm[1:] + thick_z_mm[:-1]) / 2
    each = np.eye(len(middle))
    return np.asarray([np.interp(thin_z_mm, middle, row) for row in each], np.float32).reshape(-1, len(thin_z_mm)).T


def _told(x: NDArray[np.float32], measured: ThickMeasurement, prior: ErrorPrior) -> ErrorPrior:
    """The prior with ``inside``, c^2 of the module's text, and ``flat_hu``, from sampled columns.

    As it is where too few tell.
    """
    covered, window, noise = measured.operator.covered, prior.window, measured.noise_hu
    a = measured.operator.matrix[covered].astype(np.float32)
    stride = max(1, int(np.ceil(np.sqrt(x.shape[1] * x.shape[2] / MAX_COLUMNS))))
    some, thick = (
        np.ascontiguousarray(v[:, ::stride, ::stride], np.float32).reshape(len(v), -1) for v in (x, measured.hu)
    )
    deep = (some > window.lower + DEEP_HU) & (some < window.upper - DEEP_HU)
    beyond = (some <= window.lower) | (some >= window.upper)
    squares = np.square(thick[covered] - a @ some)
    power = _power(a, prior.interpolation_error(steps(thick[covered]), len(some)), measured.thin_z_mm)
    unit = float(np.mean(_power(a, np.ones((a.shape[1], 1), np.float32), measured.thin_z_mm)))
    inside, excesses = prior.inside, []
    for part in (deep, beyond):
        told = a @ part.astype(np.float32) > 0.98
        if told.sum() < MIN_TOLD:
            excesses.append(0.0)
            continue
        r2, p = squares[told].astype(np.float64), power[told].astype(np.float64)
        excesses.append(max(0.0, float(r2[p <= np.quantile(p, EVEN)].mean()) - noise**2))
        if part is deep:
            steep = p >= np.quantile(p, STEEP)
            excess = float(r2[steep].mean()) - noise**2 - excesses[0]
            inside = min(1.0, max(0.0, excess) / float(p[steep].mean()))
    # Weighed like a signal in noise: what is far below the noise is not worth chasing.
    inner, outer = (float(np.sqrt(e / unit) * e / (e + noise**2)) for e in excesses)
    return replace(prior, inside=inside, flat_hu=(inner, outer))


def _power(a: NDArray[np.float32], h: NDArray[np.float32], thin_z_mm: NDArray[np.float64]) -> NDArray[np.float32]:
    """a H R H a^T of every thick slice and column, (K, C) HU^2."""
    correlation = hat_correlation(thin_z_mm).astype(np.float32)
    power = np.empty((len(a), h.shape[1]), np.float32)
    for k, row in enumerate(a):
        own = np.flatnonzero(row)
        weighed = row[own, None] * h[own]
        power[k] = np.einsum("nc,nc->c", weighed, correlation[np.ix_(own, own)] @ weighed)
    return power
