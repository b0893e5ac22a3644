"""A sample's texture brought to that of true thin slices, in ker A."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.forward_model import ThickMeasurement
from pipeline.metrics import TexturePower, drawn_texture, lacking

LEAST_ADDED_HU = 0.05
"""RMS below which nothing is worth adding."""


def with_texture(
    hu: NDArray[np.int16], measured: ThickMeasurement, wanted: TexturePower, floor: int
) -> tuple[NDArray[np.int16], Mapping[str, Any]]:
    """Add the noise that a finished sample (z, y, x) HU lacks of the texture wanted, and say how much.

    The noise is in ker A, so that the sample agrees with the thick slices as it did. It is drawn from a seed that is
    the sample's own content: the same sample gets the same noise, whoever composes it.

    Returns:
        (z, y, x) int16 HU not below ``floor``, and ``texture_added_hu``, the RMS of what was added.
    """
    amplitudes = lacking(wanted, TexturePower.of(hu, measured.operator), measured.operator)
    seed = int.from_bytes(hashlib.blake2b(np.ascontiguousarray(hu).data, digest_size=8).digest(), "little")
    out, squares = hu.copy(), 0.0
    for rows, noise in drawn_texture(hu, amplitudes, measured.operator, seed):
        squares += float(np.sum(np.square(noise, dtype=np.float64)))
        out[:, rows] = np.clip(np.rint(hu[:, rows] + noise), floor, 32767)
    added = float(np.sqrt(squares / hu.size))
    if added < LEAST_ADDED_HU:
        return hu, {"texture_added_hu": 0.0}
    return out, {"texture_added_hu": round(added, 3)}
