"""Per-channel moments of latents, merged exactly, and the whitening that the trainer applies on read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentcache.errors import InputError
from latentcache.records import COMPRESSION
from latentcache.tables import matrix, positions

ROW = ("key", "role", "valid_zyx", "mean", "std")
"""Columns that moments need of a manifest row."""


def moments_of(rows: pa.Table, catalog: pa.Table, encode_key: str) -> Moments:
    """The same of rows that were read already: latents of the encode key, and the catalog's splits.

    Raises:
        InputError: None of them is of the training split.
    """
    train = catalog.filter(pc.equal(catalog["split"], "train"))["series_key"]
    thin = np.asarray(pc.equal(rows["role"], "thin"))
    table = rows.select(ROW).filter(pa.array(thin & (positions(rows["key"], train) >= 0)))
    if table.num_rows == 0:
        raise InputError(
            f"no thin latents of the training split under encode key {encode_key}",
            expected="at least one",
            remedy="Run `ctpipe encode STORE` first, or choose another encode key (`ctpipe status STORE`).",
        )
    valid, mean, std = (matrix(table, name) for name in ("valid_zyx", "mean", "std"))
    return merge_all(np.prod(-(-valid // COMPRESSION), axis=1), mean, std)


Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per channel (mean and m2 of shape (C,), float64)."""

    count: int
    mean: Floats
    m2: Floats

    @classmethod
    def of(cls, array: NDArray[np.floating]) -> Moments:
        """Two-pass moments of a (C, ...) array in float64, one channel at a time to bound memory."""
        count = math.prod(array.shape[1:])
        mean, m2 = np.zeros(len(array)), np.zeros(len(array))
        for c, channel in enumerate(array):
            values = channel.astype(np.float64)
            mean[c] = values.mean()
            values -= mean[c]
            m2[c] = np.vdot(values, values)
        return cls(count, mean, m2)

    @classmethod
    def from_row(cls, count: int, mean: Iterable[float], std: Iterable[float]) -> Moments:
        """Back from a manifest row, whose std is the population's."""
        deviation = np.asarray(tuple(std), np.float64)
        return cls(count, np.asarray(tuple(mean), np.float64), count * deviation**2)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union (Chan, Golub, LeVeque 1979, eq. 2.1): exact but for rounding, in any order."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, m2)

    @property
    def std(self) -> Floats:
        """Population standard deviation."""
        return np.sqrt(self.m2 / max(self.count, 1))


def merge_all(counts: NDArray[np.int64], mean: Floats, std: Floats) -> Moments:
    """Moments of the union of n sets at once: counts (n,), mean and std (n, C).

    The grand mean first, then deviations from it, so that nothing cancels.
    """
    total = int(counts.sum())
    weight = counts[:, None].astype(np.float64)
    grand = (weight * mean).sum(0) / max(total, 1)
    m2 = (weight * (std**2 + (mean - grand) ** 2)).sum(0)
    return Moments(total, grand, m2)
