"""Statistics of a store for people: moments, histograms, channel correlations and outliers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentcache import (
    COMPRESSION,
    InputError,
    LatentRecord,
    LatentRole,
    LatentStore,
    Moments,
    merge_all,
    valid_latents,
)
from latentcache.tables import matrix

HISTOGRAM_STDS = 5.0
HISTOGRAM_BINS = 50
OUTLIER_Z = 6.0
"""Robust z-score (median and MAD over latents) of a latent's channel mean or log std beyond which it is named."""


@dataclass(frozen=True)
class Outlier:
    """A latent unlike the others. ``z`` is the largest robust z-score, of ``figure`` in ``channel``."""

    key: str
    figure: str
    channel: int
    value: float
    z: float


@dataclass(frozen=True)
class LatentStatistics:
    """Of one encoding and role. Moments are over all latents, histogram and correlation over the sampled ones.

    ``histogram`` is (C, bins) counts over ``edges`` in units of each channel's std around its mean; values beyond fall
    into the outermost bins. ``correlation`` is (C, C).
    """

    encode_key: str
    role: str
    latents: int
    moments: Moments
    sampled: int
    edges: NDArray[np.float64]
    histogram: NDArray[np.int64]
    correlation: NDArray[np.float64]
    outliers: tuple[Outlier, ...]


def summarise(store: LatentStore, encode_key: str, role: LatentRole, sample: int = 32) -> LatentStatistics:
    """Moments of every row; histograms and correlations of up to ``sample`` latents, spread evenly over the rows.

    Raises:
        InputError: The encoding has no latent of this role.
    """
    table = store.manifest_table(("encode_key", "key", "role", "valid_zyx", "mean", "std"))
    mine = pc.and_(pc.equal(table.column("encode_key"), encode_key), pc.equal(table.column("role"), role))
    table = table.filter(mine)
    if table.num_rows == 0:
        raise InputError(
            f"no {role} latents under encode key {encode_key}",
            expected="at least one",
            remedy="`ctpipe status STORE` lists what there is.",
        )
    keys = table.column("key").to_pylist()
    valid, mean, std = (matrix(table, name) for name in ("valid_zyx", "mean", "std"))
    moments = merge_all(np.prod(-(-valid // COMPRESSION), axis=1), mean, std)
    chosen = np.unique(np.linspace(0, len(keys) - 1, min(sample, len(keys))).round().astype(int))
    rows = [row for i in chosen if (row := store.find(keys[i], role, encode_key)) is not None]
    edges, histogram, correlation = _sampled(store, rows, moments)
    outliers = _outliers(keys, mean, std)
    return LatentStatistics(
        encode_key, role, len(keys), moments, len(rows), edges, histogram, correlation, tuple(outliers)
    )


def _sampled(
    store: LatentStore, rows: list[LatentRecord], moments: Moments
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    edges = np.linspace(-HISTOGRAM_STDS, HISTOGRAM_STDS, HISTOGRAM_BINS + 1)
    channels = len(moments.mean)
    histogram = np.zeros((channels, HISTOGRAM_BINS), np.int64)
    cross = np.zeros((channels, channels))
    scale = np.maximum(moments.std, np.finfo(np.float64).tiny)
    for row in rows:
        d, h, w = valid_latents(row.valid_zyx)
        values = store.read(row)[:, :d, :h, :w].reshape(channels, -1).astype(np.float64)
        values = (values - moments.mean[:, None]) / scale[:, None]
        cross += values @ values.T
        inside = np.clip(values, edges[0], edges[-1])
        for c in range(channels):
            histogram[c] += np.histogram(inside[c], edges)[0]
    norm = np.sqrt(np.diag(cross))
    return edges, histogram, cross / np.maximum(np.outer(norm, norm), np.finfo(np.float64).tiny)


def _outliers(keys: list[str], mean: NDArray[np.float64], std: NDArray[np.float64]) -> list[Outlier]:
    """Latents whose mean or log std is far from the median of all, worst first. Needs ten latents to judge."""
    if len(keys) < 10:
        return []
    found: dict[str, Outlier] = {}
    for figure, values in (("mean", mean), ("log_std", np.log(np.maximum(std, 1e-12)))):
        centre = np.median(values, axis=0)
        spread = 1.4826 * np.median(np.abs(values - centre), axis=0)  # MAD as a normal's sigma
        z = np.abs(values - centre) / np.maximum(spread, 1e-9)
        for row in np.flatnonzero(z.max(axis=1) > OUTLIER_Z):
            channel = int(z[row].argmax())
            outlier = Outlier(keys[row], figure, channel, float(values[row, channel]), float(z[row, channel]))
            if keys[row] not in found or outlier.z > found[keys[row]].z:
                found[keys[row]] = outlier
    return sorted(found.values(), key=lambda o: -o.z)
