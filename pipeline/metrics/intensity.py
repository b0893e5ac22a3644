"""Image metrics on HU volumes (z, y, x), each with a stated range and mask. Bad input raises, never averages away.

Every sum runs over slices or thin slabs in float64, so that a volume of 300x512x512 needs no second copy of itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from latentcache import InputError, NonFiniteError

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


def mean_squared_error(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    mask: NDArray[np.bool_] | None = None,
    *,
    between: tuple[float, float] = (-np.inf, np.inf),
) -> float:
    """Mean of (prediction - truth)^2, in HU squared, of both clipped to lie ``between`` two values."""
    total, count = 0.0, 0
    for p, t in _slices(prediction, truth, mask):
        p, t = np.clip(p, *between), np.clip(t, *between)
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


def tissue_classes(truth: NDArray[Any], *, erode: int = 1) -> NDArray[np.uint8]:
    """For every voxel of the truth (z, y, x), the number of its class in ``TISSUE_CLASSES_HU`` from 1 on, or 0.

    Each class is eroded by ``erode`` voxels, so that partial volumes at its border belong to none.
    """
    depth = len(truth)
    classes = np.zeros(truth.shape, dtype=np.uint8)
    for start in range(0, depth, SLAB):
        low, high = max(0, start - erode), min(depth, start + SLAB + erode)
        own = slice(start - low, min(start + SLAB, depth) - low)
        t = truth[low:high]
        for number, (least, most) in enumerate(TISSUE_CLASSES_HU.values(), start=1):
            inside = (t >= least) & (t < most)
            if erode:
                inside = binary_erosion(inside, iterations=erode)
            classes[start : start + SLAB][inside[own]] = number
    return classes


def bias_by_tissue(
    prediction: NDArray[Any], truth: NDArray[Any], classes: NDArray[np.uint8] | None = None
) -> dict[str, dict[str, float]]:
    """Mean signed and absolute error in HU by tissue class of the truth.

    Args:
        classes: `tissue_classes` of the truth, where many predictions are compared with one.

    Classes with fewer than 100 voxels after erosion are left out.
    """
    check(prediction, truth)
    if classes is None:
        classes = tissue_classes(truth)
    bins = len(TISSUE_CLASSES_HU) + 1
    sums = np.zeros((3, bins))
    for p, t, c in zip(prediction, truth, classes, strict=True):
        place, error = c.ravel(), (p.astype(np.float64) - t).ravel()
        sums += [np.bincount(place, w, bins) for w in (error, np.abs(error), None)]
    return {
        name: {"bias_hu": float(total / n), "mae_hu": float(absolute / n), "voxels": int(n)}
        for name, (total, absolute, n) in zip(TISSUE_CLASSES_HU, sums[:, 1:].T, strict=True)
        if n >= 100
    }


def error_by_phase(
    prediction: NDArray[Any], truth: NDArray[Any], thin_z_mm: NDArray[Any], thick_z_mm: NDArray[Any], bins: int = 5
) -> list[dict[str, float]]:
    """RMS error in HU by where a thin slice is: phase 0 is on a thick position, 0.5 half way between two.

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
