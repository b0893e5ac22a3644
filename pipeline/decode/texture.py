"""A sample's texture brought to that of true thin slices, in ker A."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model import ThickMeasurement
from pipeline.metrics import Texture, TexturePower, drawn_texture, enlarged_detail, lacking

LEAST_ADDED_HU = 0.05
"""RMS below which nothing is worth adding."""


def with_texture(
    hu: NDArray[np.int16], measured: ThickMeasurement, wanted: Texture, floor: int
) -> tuple[NDArray[np.int16], Mapping[str, Any]]:
    """Enlarge the detail of a finished sample (z, y, x) HU, add the noise that it then lacks, and say how much.

    Both are in ker A, so that the sample agrees with the thick slices as it did. The noise is drawn from a seed that is
    the sample's own content: the same sample gets the same noise, whoever composes it.

    Returns:
        (z, y, x) int16 HU not below ``floor``, and ``texture_added_hu``, the RMS of what was added.
    """
    operator, full = measured.operator, hu.copy()
    for rows, more in enlarged_detail(hu, wanted.gain, operator):
        full[:, rows] = np.clip(np.rint(hu[:, rows] + more), floor, 32767)
    amplitudes = lacking(wanted.noise, TexturePower.of(full, operator), operator)
    seed = int.from_bytes(hashlib.blake2b(np.ascontiguousarray(hu).data, digest_size=8).digest(), "little")
    out, squares = full.copy(), 0.0
    for rows, noise in drawn_texture(full, amplitudes, operator, seed):
        out[:, rows] = np.clip(np.rint(full[:, rows] + noise), floor, 32767)
        squares += float(np.sum(np.square(out[:, rows] - hu[:, rows], dtype=np.float64)))
    added = float(np.sqrt(squares / hu.size))
    if added < LEAST_ADDED_HU:
        return hu, {"texture_added_hu": 0.0}
    return out, {"texture_added_hu": round(added, 3)}
