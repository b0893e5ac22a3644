"""Sharpness along z: edge width and modulation transfer, measured on edges that lie across the slices.

The edges are the truth's own (the lung's dome, the liver's edge), as coronal and sagittal views show them. Every chosen
column is shifted by where the *truth* crosses the middle of its edge, so that the mean edge is sampled between slices
(the slanted-edge idea of ISO 12233), and a method that moves edges is charged with blur.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError

REACH_MM = 8.0
"""Half length of the profile around an edge."""
BIN_MM = 0.25
"""Step of the mean edge: a quarter of a usual thin slice."""
MAX_COLUMNS = 20_000


@dataclass(frozen=True)
class Sharpness:
    """Mean edge along z.

    Attributes:
        width_mm: Distance between 10% and 90% of the step.
        mtf50_per_mm, mtf10_per_mm: Frequencies in line pairs a mm where the modulation falls to 50% and 10%; None
            where it does not within the measured band.
        edges: Columns that were averaged.
    """

    width_mm: float
    mtf50_per_mm: float | None
    mtf10_per_mm: float | None
    edges: int


@dataclass(frozen=True)
class Edges:
    """Places where the truth's columns go through an edge, for n columns; see `find_edges`.

    Attributes:
        place: (3, n) indices z, y, x of the last slice before the crossing.
        share: (n,) where between that slice and the next one the truth crosses the middle.
        rising: (n,) whether HU rise along z.
        reach: Slices that a profile takes on either side.
    """

    place: NDArray[np.intp]
    share: NDArray[np.float64]
    rising: NDArray[np.bool_]
    reach: int
    spacing_mm: float


def find_edges(
    truth: NDArray[Any], spacing_mm: float, *, low_hu: float = -700.0, high_hu: float = 0.0, limit: int = MAX_COLUMNS
) -> Edges:
    """The truth's edges along z, row by row until there are ``limit``.

    Edges are where the truth's column goes once through the middle between ``low_hu`` and ``high_hu``, with both sides
    within a quarter of the step of their level over the outer third of +/- 8 mm.

    Raises:
        InputError: Fewer than 30 such columns, or too few slices.
    """
    reach = max(3, round(REACH_MM / spacing_mm))
    depth = len(truth)
    if depth < 2 * reach + 2:
        raise InputError(f"{depth} slices", expected=f"at least {2 * reach + 2}", remedy="Use another metric.")
    step, middle = high_hu - low_hu, (high_hu + low_hu) / 2
    edge = max(1, reach // 3)
    offsets = np.arange(-reach + 1, reach + 1)
    places: list[NDArray[np.intp]] = []
    shares: list[NDArray[np.float64]] = []
    directions: list[NDArray[np.bool_]] = []
    count = 0
    for y in range(truth.shape[1]):
        t = truth[:, y].astype(np.float32)
        above = t >= middle
        k, x = np.nonzero((above[:-1] != above[1:])[reach - 1 : depth - reach])
        k += reach - 1
        around = t[k[:, None] + offsets, x[:, None]].astype(np.float64)
        begin, end = around[:, :edge], around[:, -edge:]
        levels = np.sort(np.stack([begin.mean(axis=1), end.mean(axis=1)]), axis=0)
        spread = np.maximum(np.ptp(begin, axis=1), np.ptp(end, axis=1))
        off = np.abs(levels - np.array([[low_hu], [high_hu]])).max(axis=0)
        once = np.count_nonzero(np.diff(around > middle, axis=1), axis=1) == 1
        good = np.flatnonzero((spread < step / 4) & (off <= step / 4) & once)
        before, after = around[good, reach - 1], around[good, reach]
        shares.append((middle - before) / (after - before))
        directions.append(around[good, -1] > around[good, 0])
        places.append(np.stack([k[good], np.full(len(good), y), x[good]]))
        count += len(good)
        if count >= limit:
            break
    if count < 30:
        raise InputError(f"{count} edges across the slices", expected="at least 30", remedy="Use other HU levels.")
    return Edges(np.concatenate(places, axis=1), np.concatenate(shares), np.concatenate(directions), reach, spacing_mm)


def edge_profile(volume: NDArray[Any], edges: Edges) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean normalised edge of ``volume`` (z, y, x) at the truth's edges: (distance in mm, value from 0 to 1)."""
    k, y, x = edges.place
    offsets = np.arange(-edges.reach + 1, edges.reach + 1)
    profile = volume[k[:, None] + offsets, y[:, None], x[:, None]].astype(np.float64)
    distance = (offsets - edges.share[:, None]) * edges.spacing_mm
    distance[~edges.rising] *= -1  # a falling edge is read from its other side
    z, values = distance.ravel(), profile.ravel()
    bins = np.arange(-REACH_MM + edges.spacing_mm, REACH_MM - edges.spacing_mm + BIN_MM / 2, BIN_MM)
    place = np.digitize(z, bins) - 1
    inside = (place >= 0) & (place < len(bins) - 1)
    count = np.bincount(place[inside], minlength=len(bins) - 1)
    mean = np.bincount(place[inside], values[inside], len(bins) - 1) / np.maximum(count, 1)
    centers = np.bincount(place[inside], z[inside], len(bins) - 1) / np.maximum(count, 1)
    keep = count > 0
    grid = bins[:-1] + BIN_MM / 2
    curve = np.interp(grid, centers[keep], mean[keep])
    plateau = max(2, round(1.5 / BIN_MM))
    bottom, top = curve[:plateau].mean(), curve[-plateau:].mean()
    return grid, (curve - bottom) / (top - bottom)


def modulation_transfer(
    distance_mm: NDArray[np.float64], edge: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Frequencies in 1/mm and |FT of the edge's derivative|, 1 at frequency 0 (IEC 62220-1 practice).

    The finite difference's own transfer, sinc(f h), is divided out.
    """
    h = float(distance_mm[1] - distance_mm[0])
    line = np.diff(edge)
    padded = 8 * len(line)
    spectrum = np.abs(np.fft.rfft(line, padded))
    frequency = np.fft.rfftfreq(padded, h)
    band = frequency <= 1.0
    mtf = spectrum[band] / spectrum[0] / np.sinc(frequency[band] * h)
    return np.asarray(frequency[band], dtype=np.float64), np.asarray(mtf, dtype=np.float64)


def sharpness(volume: NDArray[Any], edges: Edges) -> Sharpness:
    """Edge width and MTF along z of ``volume`` (z, y, x) at the truth's edges; see ``edge_profile``."""
    z, edge = edge_profile(volume, edges)
    frequency, mtf = modulation_transfer(z, edge)
    return Sharpness(
        _last_below(z, edge, 0.9) - _last_below(z, edge, 0.1), _falls_to(frequency, mtf, 0.5),
        _falls_to(frequency, mtf, 0.1), len(edges.share),
    )  # fmt: skip


def _last_below(z: NDArray[np.float64], edge: NDArray[np.float64], level: float) -> float:
    """Return the position where the edge first rises through ``level``, linearly interpolated."""
    i = int(np.argmax(edge >= level))
    if i == 0:
        return float(z[0])
    t = (level - edge[i - 1]) / (edge[i] - edge[i - 1])
    return float(z[i - 1] + t * (z[i] - z[i - 1]))


def _falls_to(frequency: NDArray[np.float64], mtf: NDArray[np.float64], level: float) -> float | None:
    below = np.flatnonzero(mtf < level)
    if not len(below):
        return None
    i = int(below[0])
    t = (mtf[i - 1] - level) / (mtf[i - 1] - mtf[i])
    return float(frequency[i - 1] + t * (frequency[i] - frequency[i - 1]))
