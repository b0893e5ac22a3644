"""Noise texture, and how restless a volume is from slice to slice."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.metrics.intensity import check

TILE = 16
"""Side in pixels of the even regions in which noise is measured."""
EVEN_HU = (-20.0, 120.0)
"""Mean HU of a region that counts as soft tissue or blood."""
MOST_NOISE_HU = 60.0
"""A tile that spreads more holds anatomy; no diagnostic series is as noisy."""


def noise_power_spectrum(regions: NDArray[Any], spacing_mm: tuple[float, float]) -> NDArray[np.float64]:
    """2-D noise power (ICRU 87, eq. 4.1): (dy dx / Ny Nx) mean |DFT(region - mean)|^2, in HU^2 mm^2.

    Args:
        regions: (n, y, x) HU of even regions. Summing the result over frequencies dfy dfx gives the variance.
    """
    r = np.asarray(regions, dtype=np.float64)
    r = r - r.mean(axis=(1, 2), keepdims=True)
    power = np.mean(np.abs(np.fft.fft2(r)) ** 2, axis=0)
    return np.asarray(power * spacing_mm[0] * spacing_mm[1] / (r.shape[1] * r.shape[2]))


def even_regions(truth: NDArray[Any], limit: int = 512) -> list[tuple[int, int, int]]:
    """(slice, row, column) of the tiles of soft tissue in which the truth is evenest, spread over the volume.

    A tile counts when its mean is soft tissue and its corners' means differ by less than a fifth of the least spread.
    """
    rows, columns = (n // TILE for n in truth.shape[1:])
    found: list[tuple[float, int, int, int]] = []
    for k in range(len(truth)):
        tiles = truth[k, : rows * TILE, : columns * TILE].astype(np.float64)
        tiles = tiles.reshape(rows, TILE, columns, TILE)
        mean, spread = tiles.mean(axis=(1, 3)), tiles.std(axis=(1, 3))
        for r, c in zip(*np.nonzero((mean > EVEN_HU[0]) & (mean < EVEN_HU[1])), strict=True):
            found.append((float(spread[r, c]), k, int(r) * TILE, int(c) * TILE))
    found.sort()
    if not found:
        return []
    bound = 1.5 * found[len(found) // 20][0] + 1.0
    return [(k, r, c) for spread, k, r, c in found if spread <= min(bound, MOST_NOISE_HU)][:limit]


def noise_texture(
    prediction: NDArray[Any], truth: NDArray[Any], spacing_mm: tuple[float, float]
) -> dict[str, dict[str, float]]:
    """Noise of both volumes in the truth's even regions: standard deviation in HU and mean frequency in 1/mm.

    The mean frequency is the first moment of the radially weighted spectrum: it falls when texture is smoothed.

    Raises:
        InputError: Fewer than 10 even regions.
    """
    check(prediction, truth)
    places = even_regions(truth)
    if len(places) < 10:
        raise InputError(
            f"{len(places)} even regions of soft tissue", expected="at least 10", remedy="Use another metric."
        )
    out: dict[str, dict[str, float]] = {}
    fy, fx = (np.fft.fftfreq(TILE, s) for s in spacing_mm)
    radius = np.hypot(fy[:, None], fx[None, :])
    for name, volume in (("prediction", prediction), ("truth", truth)):
        regions = np.stack([volume[k, r : r + TILE, c : c + TILE] for k, r, c in places])
        power = noise_power_spectrum(regions, spacing_mm)
        step = 1 / (TILE * spacing_mm[0]) / (TILE * spacing_mm[1])
        total = float(power.sum())
        frequency = float((power * radius).sum() / total) if total > 0 else 0.0
        out[name] = {"std_hu": float(np.sqrt(total * step)), "mean_frequency_per_mm": frequency}
    return out


def slice_inconsistency(prediction: NDArray[Any], truth: NDArray[Any]) -> dict[str, float]:
    """Return the slice-to-slice inconsistency of a volume along z, beside the truth's.

    Returns:
        ``jitter_hu``: the part of the slices' mean error that jumps from slice to slice: RMS of its second difference
        over sqrt(6), which is s for independent offsets of standard deviation s and 0 for a bias linear in z.
        ``roughness_ratio``: RMS of the voxels' second difference along z over the truth's; below 1 is smoother (blur),
        above 1 rougher (invented detail or banding). NaN where the truth is constant along z.

    Raises:
        InputError: Fewer than 3 slices.
    """
    check(prediction, truth)
    if len(truth) < 3:
        raise InputError(f"{len(truth)} slices", expected="at least 3", remedy="Use another metric.")
    offset = np.array([float(np.mean(p.astype(np.float64) - t)) for p, t in zip(prediction, truth, strict=True)])
    jitter = float(np.sqrt(np.mean(np.diff(offset, 2) ** 2) / 6))
    rough = [_second_difference(volume) for volume in (prediction, truth)]
    return {"jitter_hu": jitter, "roughness_ratio": rough[0] / rough[1] if rough[1] > 0 else float("nan")}


def _second_difference(volume: NDArray[Any]) -> float:
    total = 0.0
    for k in range(1, len(volume) - 1):
        d = volume[k - 1].astype(np.float64) - 2.0 * volume[k] + volume[k + 1]
        total += float(np.mean(d**2))
    return float(np.sqrt(total / (len(volume) - 2)))
