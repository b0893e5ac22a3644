"""Noise texture, and how restless a volume is from slice to slice."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.metrics.intensity import check

TILE_MM = 11.0
TILE_PIXELS = (6, 16)
"""Side of the even regions in which noise is measured: so many mm, within these bounds in pixels."""
EVEN_HU = (-20.0, 120.0)
"""Mean HU of a region that counts as soft tissue or blood."""
MOST_NOISE_HU = 60.0
"""A tile whose neighbours spread more holds anatomy; no diagnostic series is as noisy."""


def noise_power_spectrum(regions: NDArray[Any], spacing_mm: tuple[float, float]) -> NDArray[np.float64]:
    """2-D noise power (ICRU 87, eq. 4.1): (dy dx / Ny Nx) mean |DFT(region - mean)|^2, in HU^2 mm^2.

    Args:
        regions: (n, y, x) HU of even regions. Summing the result over frequencies dfy dfx gives the variance.
    """
    r = np.asarray(regions, dtype=np.float64)
    r = r - r.mean(axis=(1, 2), keepdims=True)
    power = np.mean(np.abs(np.fft.fft2(r)) ** 2, axis=0)
    return np.asarray(power * spacing_mm[0] * spacing_mm[1] / (r.shape[1] * r.shape[2]))


def tile_of(spacing_mm: tuple[float, float]) -> int:
    """Side in pixels of an even region."""
    return int(np.clip(round(TILE_MM / max(spacing_mm)), *TILE_PIXELS))


def even_regions(truth: NDArray[Any], tile: int, limit: int = 512) -> list[tuple[int, int, int]]:
    """(slice, row, column) of the tiles of soft tissue in which the truth is evenest, spread over the volume.

    Judged by the mean of the two slices before and the two after: chosen for a tile's own noise, the regions would be
    those where the truth happens to have little, and any other volume of the same noise would seem to have more.
    """
    rows, columns = (n // tile for n in truth.shape[1:])
    found: list[tuple[float, int, int, int]] = []
    for k in range(2, len(truth) - 2):
        about = np.mean([truth[j, : rows * tile, : columns * tile] for j in (k - 2, k - 1, k + 1, k + 2)], axis=0)
        tiles = about.reshape(rows, tile, columns, tile)
        mean, spread = tiles.mean(axis=(1, 3)), tiles.std(axis=(1, 3))
        for r, c in zip(*np.nonzero((mean > EVEN_HU[0]) & (mean < EVEN_HU[1])), strict=True):
            found.append((float(spread[r, c]), k, int(r) * tile, int(c) * tile))
    found.sort()
    if not found:
        return []
    bound = 1.5 * found[len(found) // 20][0] + 1.0
    even = [(k, r, c) for spread, k, r, c in found if spread <= min(bound, MOST_NOISE_HU)]
    return even[:: max(1, -(-len(even) // limit))]


def noise_texture(
    prediction: NDArray[Any], truth: NDArray[Any], spacing_mm: tuple[float, float]
) -> dict[str, dict[str, float]]:
    """Noise of both volumes in the truth's even regions: standard deviation in HU and mean frequency in 1/mm.

    The mean frequency is the first moment of the radially weighted spectrum: it falls when texture is smoothed.
    ``ratio`` is the prediction's over the truth's.

    Raises:
        InputError: Fewer than 10 even regions.
    """
    check(prediction, truth)
    tile = tile_of(spacing_mm)
    places = even_regions(truth, tile)
    if len(places) < 10:
        raise InputError(
            f"{len(places)} even regions of soft tissue", expected="at least 10", remedy="Use another metric."
        )
    out: dict[str, dict[str, float]] = {}
    fy, fx = (np.fft.fftfreq(tile, s) for s in spacing_mm)
    radius = np.hypot(fy[:, None], fx[None, :])
    for name, volume in (("prediction", prediction), ("truth", truth)):
        regions = np.stack([volume[k, r : r + tile, c : c + tile] for k, r, c in places])
        power = noise_power_spectrum(regions, spacing_mm)
        step = 1 / (tile * spacing_mm[0]) / (tile * spacing_mm[1])
        total = float(power.sum())
        frequency = float((power * radius).sum() / total) if total > 0 else 0.0
        out[name] = {"std_hu": float(np.sqrt(total * step)), "mean_frequency_per_mm": frequency}
    p, t = out["prediction"], out["truth"]
    out["ratio"] = {figure: p[figure] / t[figure] if t[figure] > 0 else float("nan") for figure in t}
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
