"""A certificate for every output: mean(A x - y) in lung, fat and soft tissue, which needs no thin series to compute.

A network that shifts a tissue by a constant, as regression does in lung, shifts what its slices average to by the same,
so the mean misfit in even tissue tells a displaced output from a right one. It says nothing of detail in ker A: that is
what the spread over samples is for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, uniform_filter

from pipeline.forward_model.thick_measurement import ThickMeasurement

TISSUES_HU: Mapping[str, tuple[float, float]] = {
    "lung": (-950.0, -700.0),
    "fat": (-120.0, -60.0),
    "soft_tissue": (0.0, 80.0),
}
"""Ranges of thick HU, means of 3 x 3 pixels."""
EROSION = 2
"""Pixels taken off each region's border in-plane, where partial volumes lie."""
LIMIT_HU = 1.0
"""Largest mean misfit that passes."""
MIN_VOXELS = 500
"""Voxels below which a tissue is not judged: the noise of a mean over 500 of 4 HU each is 0.2 HU."""


@dataclass(frozen=True)
class Certificate:
    """Of one output.

    Attributes:
        shift_hu: Mean of A x - y by tissue that could be judged.
        voxels: How many voxels each judged mean is over.
        missing: Tissues too small to be judged, as lung is in a head.
    """

    shift_hu: Mapping[str, float]
    voxels: Mapping[str, int]
    missing: tuple[str, ...]

    @property
    def failing(self) -> tuple[str, ...]:
        """Tissues shifted by more than ``LIMIT_HU``."""
        return tuple(name for name, shift in self.shift_hu.items() if abs(shift) > LIMIT_HU)

    def __str__(self) -> str:
        """One clause for a reader: what fails, what passes, and what could not be computed."""
        named = {name: f"{name.replace('_', ' ')} {shift:+.1f} HU" for name, shift in self.shift_hu.items()}
        parts = []
        if self.failing:
            parts.append("certificate FAILS: " + ", ".join(named[name] for name in self.failing))
        elif named:
            parts.append("certificate passes: " + ", ".join(named.values()))
        if self.missing:
            words = ", ".join(name.replace("_", " ") for name in self.missing)
            parts.append(f"certificate not computed: too little {words} in the field")
        return "; ".join(parts)

    def figures(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "shift_hu": {name: round(shift, 3) for name, shift in self.shift_hu.items()},
            "voxels": dict(self.voxels),
            "missing": list(self.missing),
            "failing": list(self.failing),
            "said": str(self),
        }


def certificate(x: NDArray[Any], measured: ThickMeasurement) -> Certificate:
    """Judge an output x (N, y, x) HU over the thick slices that its grid wholly covers."""
    operator = measured.operator
    total = dict.fromkeys(TISSUES_HU, 0.0)
    voxels = dict.fromkeys(TISSUES_HU, 0)
    for k in np.flatnonzero(operator.judged):
        own = np.flatnonzero(operator.matrix[k])
        y = np.asarray(measured.hu[k], dtype=np.float32)
        averaged = np.einsum("n,nyx->yx", operator.matrix[k, own].astype(np.float32), x[own].astype(np.float32))
        smooth = uniform_filter(y, 3, mode="nearest")
        for name, (low, high) in TISSUES_HU.items():
            inside = binary_erosion((smooth >= low) & (smooth <= high), np.ones((3, 3)), iterations=EROSION)
            total[name] += float((averaged - y)[inside].sum(dtype=np.float64))
            voxels[name] += int(np.count_nonzero(inside))
    judged = [name for name in TISSUES_HU if voxels[name] >= MIN_VOXELS]
    return Certificate(
        {name: total[name] / voxels[name] for name in judged},
        {name: voxels[name] for name in judged},
        tuple(name for name in TISSUES_HU if name not in judged),
    )
