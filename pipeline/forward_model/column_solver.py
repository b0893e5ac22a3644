"""Corrections along z, for many image columns at once, under an error whose size differs from voxel to voxel.

Per column: the volume nearest to x that averages to given thick slices and stays within bounds, in the metric of

    S = D R D,   D = diag(sigma), the size of x's error voxel by voxel;   R, its correlation along z

Without bounds that is x + S A^T mu with (A S A^T + lambda) mu = what A x is to change by. A thick slice averages a few
thin ones and R reaches a few mm, so A S A^T is banded, and the systems of all columns are factored side by side: a loop
over slices whose every step is a row of columns. A voxel that would leave its bounds is held there (sigma 0) and its
column solved again, so that its neighbours take over its part: an active set that grows a few times.

Shapes: N thin slices, K thick slices, w thin slices under a profile, C columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Columns = NDArray[np.float32]
Bound = NDArray[np.float32] | np.float32


PRIOR_LENGTH_MM = 1.5
"""Correlation length along z of the error of x: about one thin slice, so that corrections do not ring."""
DROPPED = 1e-4
"""Weights of A below this share of their row's largest do not take part in the solution (they do in the residual)."""
COUPLED = 1e-4
"""Thick slices whose correlation under unit sigma is less than this are solved for as if independent."""
TINY_HU2 = 1e-6
"""Keeps pivots positive where sigma is 0."""
BOUND_ROUNDS = 4
"""Times that the set of voxels held at a bound may grow."""
BEYOND_HU = np.float32(1.0)
"""A voxel less than this beyond its bound is put there as it is."""


def hat_correlation(thin_z_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """R (N, N): a hat with the area of exp(-|dz| / length), positive definite as that is, but it ends."""
    away = np.abs(thin_z_mm[:, None] - thin_z_mm[None, :])
    return np.asarray(np.maximum(0.0, 1.0 - away / (2 * PRIOR_LENGTH_MM)))


class _Part(NamedTuple):
    """The columns that touch a bound."""

    x: Columns
    sigma: Columns
    low: Columns
    high: Columns
    target: Columns

    def of(self, columns: NDArray[np.intp]) -> _Part:
        return _Part(*(v[:, columns] for v in self))


class ColumnSolver:
    """Solves for one slice operator's columns; what depends on positions alone is made once."""

    def __init__(self, a: NDArray[np.float64], thin_z_mm: NDArray[np.float64], damping: NDArray[np.float64]) -> None:
        """``a`` (K, N): the covered rows of A; ``damping`` (K,): lambda as a share of the diagonal of A S A^T."""
        n_thick, n_thin = a.shape
        correlation = hat_correlation(thin_z_mm)
        kept = np.where(np.abs(a) >= DROPPED * np.abs(a).max(axis=1, keepdims=True), a, 0.0)
        first = np.array([np.flatnonzero(row)[0] for row in kept])
        last = np.array([np.flatnonzero(row)[-1] for row in kept])
        width = int((last - first).max()) + 1
        start = np.minimum(first, n_thin - width)
        self.index = start[:, None] + np.arange(width)[None, :]
        self.weight = np.take_along_axis(kept, self.index, axis=1).astype(np.float32)[:, :, None]
        unit = kept @ correlation @ kept.T
        scale = np.sqrt(np.diag(unit))
        linked = np.argwhere(np.abs(unit) > COUPLED * scale[:, None] * scale[None, :])
        self.band = int((linked[:, 1] - linked[:, 0]).max(initial=0))
        self.between = [
            correlation[self.index[j:, :, None], self.index[: n_thick - j, None, :]].astype(np.float32)
            for j in range(self.band + 1)
        ]
        self.a = sparse.csr_matrix(kept.astype(np.float32))
        self.back = sparse.csr_matrix(kept.T.astype(np.float32))
        self.correlation = sparse.csr_matrix(correlation.astype(np.float32))
        self.damping = damping.astype(np.float32)[:, None]

    def solve(self, x: Columns, wanted: Columns, sigma: Columns, low: Bound, high: Bound, ridge_hu2: float) -> Columns:
        """x corrected by ``wanted``, within bounds.

        Args:
            x: (N, C) HU.
            wanted: (K, C) HU that A x is to change by.
            sigma: (N, C) HU, the size of x's error.
            low, high: (N, C) HU, or one number.
            ridge_hu2: Added to the diagonal of A S A^T: variance of y that nothing is to be made of.
        """
        out = self._free(x, wanted, sigma, ridge_hu2)
        wrong = (out < low - BEYOND_HU) | (out > high + BEYOND_HU)
        live = np.flatnonzero(wrong.any(axis=0))
        if len(live):
            lows, highs = (np.broadcast_to(v, x.shape) for v in (low, high))
            target = self.a @ x[:, live] + wanted[:, live]
            part = _Part(x[:, live], sigma[:, live], lows[:, live], highs[:, live], target)
            found, wrong = out[:, live], wrong[:, live]
            for _ in range(BOUND_ROUNDS):
                np.copyto(part.x, np.clip(found, part.low, part.high), where=wrong)
                np.copyto(part.sigma, np.float32(0), where=wrong)
                found = self._free(part.x, part.target - self.a @ part.x, part.sigma, ridge_hu2)
                out[:, live] = found
                wrong = (found < part.low - BEYOND_HU) | (found > part.high + BEYOND_HU)
                still = np.flatnonzero(wrong.any(axis=0))
                if not len(still):
                    break
                live, found, wrong, part = live[still], found[:, still], wrong[:, still], part.of(still)
        return np.asarray(np.clip(out, low, high, out=out))

    def _free(self, x: Columns, wanted: Columns, sigma: Columns, ridge_hu2: float) -> Columns:
        """As ``solve``, without bounds: x + S A^T mu."""
        out = self.back @ self._multipliers(sigma, wanted, ridge_hu2)
        out *= sigma
        out = self.correlation @ out
        out *= sigma
        out += x
        return np.asarray(out)

    def _multipliers(self, sigma: Columns, wanted: Columns, ridge_hu2: float) -> Columns:
        """mu (K, C) of (A S A^T + lambda) mu = wanted, by a banded L D L^T of all columns side by side."""
        n, band = len(wanted), self.band
        shaped = sigma[self.index]
        shaped *= self.weight
        rows = [np.zeros_like(wanted) for _ in range(band + 1)]
        for j, row in enumerate(rows):
            row[: n - j] = np.einsum("kwc,kwc->kc", shaped[j:], self.between[j] @ shaped[: n - j])
        pivot = (rows[0] + np.float32(ridge_hu2 + TINY_HU2)) * (1 + self.damping)
        lower, mu = np.stack(rows[1:]) if band else np.empty((0, n, 1), np.float32), wanted.copy()
        for k in range(n):
            reach = min(band, n - 1 - k)
            column = lower[:reach, k].copy()
            share = column / pivot[k]
            pivot[k + 1 : k + 1 + reach] -= share * column
            mu[k + 1 : k + 1 + reach] -= share * mu[k]
            for j in range(1, reach):
                for i in range(j, reach):
                    lower[i - j, k + j] -= share[j - 1] * column[i]
            lower[:reach, k] = share
        mu /= pivot
        for k in range(n - 2, -1, -1):
            reach = min(band, n - 1 - k)
            mu[k] -= (lower[:reach, k] * mu[k + 1 : k + 1 + reach]).sum(axis=0)
        return mu
