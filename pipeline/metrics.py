"""Image metrics on HU volumes (z, y, x), each with a stated range and mask. Bad input raises, never averages away.

Every sum runs over slices or thin slabs in float64, so that a volume of 300x512x512 needs no second copy of itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, correlate1d

from latentcache.errors import InputError, NonFiniteError

TISSUE_CLASSES_HU: Mapping[str, tuple[float, float]] = {
    "lung": (-950.0, -700.0),
    "fat": (-120.0, -60.0),
    "soft_tissue": (0.0, 80.0),
    "contrast": (150.0, 400.0),
    "bone": (400.0, 3000.0),
}
"""Tissue classes by the true HU, in the ranges that radiology texts give; classes leave gaps on purpose."""
SLAB = 8
"""Slices of a slab where a metric needs neighbours along z."""
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang, Simoncelli and Bovik 2003, section 3.2)."""

Slice = NDArray[np.float64]


def check(prediction: NDArray[Any], truth: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> None:
    """Raise for what cannot be compared: unequal shapes, an empty mask, values that are not finite.

    Raises:
        InputError: Unequal shapes, or a mask without a voxel.
        NonFiniteError: NaN or infinity in either volume, inside the mask.
    """
    if prediction.shape != truth.shape:
        raise InputError(
            f"prediction of shape {prediction.shape} against truth of shape {truth.shape}",
            expected="equal shapes (z, y, x)",
            remedy="Resample onto the truth's grid first; nothing is cropped or stretched silently.",
        )
    if truth.size == 0:
        raise InputError("volumes without a voxel", expected="at least one", remedy="Check the pair's overlap.")
    if mask is not None and not mask.any():
        raise InputError("an empty mask", expected="at least one voxel", remedy="Check the mask's threshold.")
    for name, volume in (("prediction", prediction), ("truth", truth)):
        if np.issubdtype(volume.dtype, np.integer):
            continue
        bad = 0
        for k in range(len(volume)):
            chosen = volume[k] if mask is None else volume[k][mask[k]]
            bad += int(chosen.size - np.count_nonzero(np.isfinite(chosen)))
        if bad:
            raise NonFiniteError(
                f"{bad} non-finite voxels in the {name}", expected="finite HU", remedy="Find the stage that made them."
            )


def require_finite(hu: NDArray[Any], what: str) -> NDArray[Any]:
    """``hu`` itself. Composition ends in int16, where a NaN would become a number: look before.

    Raises:
        NonFiniteError: NaN or infinity anywhere.
    """
    bad = sum(int(piece.size - np.count_nonzero(np.isfinite(piece))) for piece in hu)
    if bad:
        raise NonFiniteError(
            f"{bad} non-finite voxels in {what}", expected="finite HU", remedy="Check the checkpoint and its sampling."
        )
    return hu


def _slices(
    prediction: NDArray[Any], truth: NDArray[Any], mask: NDArray[np.bool_] | None = None
) -> Iterator[tuple[Slice, Slice]]:
    """The voxels to compare in float64, a slice at a time."""
    check(prediction, truth, mask)
    for k in range(len(truth)):
        p, t = (prediction[k], truth[k]) if mask is None else (prediction[k][mask[k]], truth[k][mask[k]])
        yield p.astype(np.float64), t.astype(np.float64)


def mean_squared_error(prediction: NDArray[Any], truth: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> float:
    """Mean of (prediction - truth)^2, in HU squared."""
    total, count = 0.0, 0
    for p, t in _slices(prediction, truth, mask):
        total += float(np.sum((p - t) ** 2))
        count += t.size
    return total / count


def psnr(
    prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float, mask: NDArray[np.bool_] | None = None
) -> float:
    """Peak signal-to-noise ratio, 10 log10(range^2 / MSE), in dB; ``inf`` for identical volumes."""
    mse = mean_squared_error(prediction, truth, mask)
    return float("inf") if mse == 0 else float(10 * np.log10(data_range**2 / mse))


def mean_absolute_error(prediction: NDArray[Any], truth: NDArray[Any], mask: NDArray[np.bool_] | None = None) -> float:
    """Mean of |prediction - truth|, in HU."""
    total, count = 0.0, 0
    for p, t in _slices(prediction, truth, mask):
        total += float(np.sum(np.abs(p - t)))
        count += t.size
    return total / count


def gaussian_window(size: int = 11, sigma: float = 1.5) -> NDArray[np.float64]:
    """Normalised 1-D Gaussian of Wang et al. 2004 (SSIM)."""
    x = np.arange(size) - (size - 1) / 2
    g = np.exp(-(x**2) / (2 * sigma**2))
    return np.asarray(g / g.sum())


def _similarity(
    p: NDArray[np.float64], t: NDArray[np.float64], data_range: float, axes: tuple[int, ...], mode: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """SSIM and its contrast-structure factor at every voxel."""
    kernel = gaussian_window()

    def blur(x: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in axes:
            x = correlate1d(x, kernel, axis=axis, mode=mode, cval=0.0)
        return x

    mu_p, mu_t = blur(p), blur(t)
    var_p, var_t = blur(p * p) - mu_p**2, blur(t * t) - mu_t**2
    cov = blur(p * t) - mu_p * mu_t
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    contrast = (2 * cov + c2) / (var_p + var_t + c2)
    return (2 * mu_p * mu_t + c1) / (mu_p**2 + mu_t**2 + c1) * contrast, contrast


def _inner(axes: tuple[int, ...], pad: int = 5) -> tuple[slice, ...]:
    return tuple(slice(pad, -pad) if axis in axes else slice(None) for axis in range(3))


def ssim_map(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    *,
    data_range: float,
    axes: tuple[int, ...] = (1, 2),
    border: Literal["valid", "zero"] = "valid",
) -> NDArray[np.float64]:
    """Local SSIM (Wang et al. 2004, eq. 13; K1 0.01, K2 0.03, Gaussian 11 taps, sigma 1.5) along ``axes``.

    ``axes=(1, 2)`` gives the 2-D index per slice, ``(0, 1, 2)`` the 3-D one. ``valid`` returns only positions whose
    whole window lies inside the volume; ``zero`` returns all, the outside taken as 0 (as RPLHR-CT's code does).
    """
    check(prediction, truth)
    for axis in axes:
        if truth.shape[axis] < 11:
            raise InputError(
                f"{truth.shape[axis]} voxels along axis {axis}",
                expected="at least 11 for SSIM",
                remedy="Use another metric.",
            )
    p, t = prediction.astype(np.float64), truth.astype(np.float64)
    index, _ = _similarity(p, t, data_range, axes, "constant" if border == "zero" else "reflect")
    return index if border == "zero" else np.asarray(index[_inner(axes)])


def ssim(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    *,
    data_range: float,
    axes: tuple[int, ...] = (1, 2),
    border: Literal["valid", "zero"] = "valid",
) -> float:
    """Mean SSIM; see ``ssim_map``. Slices, or slabs with their halo, are taken one by one, so that memory is small."""
    check(prediction, truth)
    depth = len(truth)
    if axes == (1, 2):
        pieces = [slice(k, k + 1) for k in range(depth)]
    elif axes == (0, 1, 2) and border == "valid" and depth >= 11:
        pieces = [slice(k, min(k + SLAB + 10, depth)) for k in range(0, depth - 10, SLAB)]
    else:
        pieces = [slice(0, depth)]
    total, count = 0.0, 0
    for piece in pieces:
        index = ssim_map(prediction[piece], truth[piece], data_range=data_range, axes=axes, border=border)
        total += float(index.sum())
        count += index.size
    return total / count


def ms_ssim(prediction: NDArray[Any], truth: NDArray[Any], *, data_range: float) -> tuple[float, int]:
    """Mean over slices of multi-scale SSIM (Wang, Simoncelli and Bovik 2003, eq. 7), and the scales used.

    Five scales need a side of 161 voxels; smaller slices get fewer, with the exponents rescaled to the same sum.
    Negative factors count as 0, since a power of them is not real.
    """
    check(prediction, truth)
    side = min(truth.shape[1:])
    scales = 0
    while scales < len(MS_SSIM_WEIGHTS) and side >> scales >= 11:
        scales += 1
    if not scales:
        raise InputError(f"slices of {side} voxels", expected="at least 11 a side", remedy="Use another metric.")
    weights = np.array(MS_SSIM_WEIGHTS[:scales])
    weights *= sum(MS_SSIM_WEIGHTS) / weights.sum()
    total = 0.0
    for k in range(len(truth)):
        p, t = prediction[k : k + 1].astype(np.float64), truth[k : k + 1].astype(np.float64)
        value = 1.0
        for scale, weight in enumerate(weights):
            index, contrast = _similarity(p, t, data_range, (1, 2), "reflect")
            factor = index if scale == scales - 1 else contrast
            value *= max(0.0, float(factor[_inner((1, 2))].mean())) ** weight
            p, t = _halved(p), _halved(t)
        total += value
    return total / len(truth), scales


def _halved(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """2x2 means; an odd last row or column is left out."""
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    return np.asarray((x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4)


def bias_by_tissue(prediction: NDArray[Any], truth: NDArray[Any], *, erode: int = 1) -> dict[str, dict[str, float]]:
    """Mean signed and absolute error in HU by tissue class of the truth, inside classes eroded by ``erode`` voxels.

    Classes with fewer than 100 voxels after erosion are left out.
    """
    check(prediction, truth)
    sums = {name: np.zeros(3) for name in TISSUE_CLASSES_HU}
    depth = len(truth)
    for start in range(0, depth, SLAB):
        low, high = max(0, start - erode), min(depth, start + SLAB + erode)
        own = slice(start - low, min(start + SLAB, depth) - low)
        t = truth[low:high]
        error = prediction[low:high][own].astype(np.float64) - t[own].astype(np.float64)
        for name, (least, most) in TISSUE_CLASSES_HU.items():
            inside = (t >= least) & (t < most)
            if erode:
                inside = binary_erosion(inside, iterations=erode)
            chosen = error[inside[own]]
            sums[name] += (chosen.sum(), np.abs(chosen).sum(), chosen.size)
    return {
        name: {"bias_hu": float(total / n), "mae_hu": float(absolute / n), "voxels": int(n)}
        for name, (total, absolute, n) in sums.items()
        if n >= 100
    }


def error_by_phase(
    prediction: NDArray[Any], truth: NDArray[Any], thin_z_mm: NDArray[Any], thick_z_mm: NDArray[Any], bins: int = 5
) -> list[dict[str, float]]:
    """RMS error in HU by where a thin slice lies: phase 0 is on a thick position, 0.5 half way between two.

    Args:
        thin_z_mm: (z,) positions of the compared slices.
        thick_z_mm: Positions of the thick slices, ascending.
        bins: Equal parts of the phases 0 to 0.5. Empty ones are left out.
    """
    check(prediction, truth)
    thick = np.asarray(thick_z_mm, dtype=np.float64)
    distance = np.abs(np.asarray(thin_z_mm, dtype=np.float64)[:, None] - thick[None, :]).min(axis=1)
    phase = np.minimum(distance / float(np.mean(np.diff(thick))), 0.5)
    place = np.minimum((phase * 2 * bins + 1e-9).astype(int), bins - 1)
    mse = np.array([np.mean((p - t) ** 2) for p, t in _slices(prediction, truth)])
    return [
        {
            "phase": float(phase[place == b].mean()),
            "rmse_hu": float(np.sqrt(mse[place == b].mean())),
            "slices": int((place == b).sum()),
        }
        for b in range(bins)
        if (place == b).any()
    ]
