"""Stored values to HU, in int16 wherever that is exact (PS3.3 C.11.1.1.2: output = slope x stored + intercept)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.instance import Instance

AIR_HU = -1024
IMPLAUSIBLE_BELOW_HU = -1500
"""No CT measures this; scanners write such values outside of the field of view, often without saying so."""
_PADDING_BELOW_HU, _PADDING_ABOVE_HU = -900, 4000
"""A padding value between these is also tissue, so that replacing it would punch holes into the patient."""


def hu_dtype(instances: Iterable[Instance]) -> np.dtype[Any]:
    """int16 where every slope and intercept is a whole number, else float32."""
    whole = all(float(one.slope or 0).is_integer() and float(one.intercept or 0).is_integer() for one in instances)
    return np.dtype(np.int16 if whole else np.float32)


def rescale_into(stored: NDArray[Any], one: Instance, slot: NDArray[Any]) -> frozenset[str]:
    """Write the HU of one frame into ``slot`` (rows, columns), int16 or float32.

    Returns:
        Facts: ``padding`` (declared padding became air), ``padding-ignored`` (declared, but a tissue value),
        ``padding-untagged`` (values below any CT number became air), ``saturated`` (clipped to int16).
    """
    slope, intercept = float(one.slope or 0), float(one.intercept or 0)
    facts = set()
    if slot.dtype == np.float32:
        slot[...] = stored * slope + intercept  # float64, as the standard's arithmetic, rounded once
    elif _rescale_int16(stored, int(slope), int(intercept), one.form.stored_range, slot):
        facts.add("saturated")
    if one.padding is not None:
        facts |= _pad(stored, one.padding, slope, intercept, slot)
    if slot.min() < IMPLAUSIBLE_BELOW_HU:
        slot[slot < IMPLAUSIBLE_BELOW_HU] = AIR_HU
        facts.add("padding-untagged")
    return frozenset(facts)


def _rescale_int16(
    stored: NDArray[Any], slope: int, intercept: int, stored_range: tuple[int, int], slot: NDArray[Any]
) -> bool:
    """Returns whether values had to be clipped."""
    limits = np.iinfo(np.int16)
    ends = [slope * v + intercept for v in stored_range]
    whole_range_fits = limits.min <= min(ends) and max(ends) <= limits.max and stored_range[1] <= limits.max
    if slope == 1 and whole_range_fits and limits.min <= intercept <= limits.max:
        np.add(stored.view(np.int16) if stored.dtype == np.uint16 else stored, np.int16(intercept), out=slot)
        return False
    wide = stored.astype(np.int64) * slope + intercept
    low, high = int(wide.min()), int(wide.max())
    # What lies below any CT number becomes air in a moment, so only the upper end can lose information.
    np.clip(wide, limits.min, limits.max, out=wide)
    slot[...] = wide
    return high > limits.max or (low < limits.min and low >= IMPLAUSIBLE_BELOW_HU)


def _pad(
    stored: NDArray[Any], padding: tuple[int, int], slope: float, intercept: float, slot: NDArray[Any]
) -> frozenset[str]:
    low, high = padding
    outside = stored == low if low == high else (stored >= low) & (stored <= high)
    if not outside.any():
        return frozenset()
    ends = sorted((low * slope + intercept, high * slope + intercept))
    if ends[1] > _PADDING_BELOW_HU and ends[0] < _PADDING_ABOVE_HU:
        return frozenset({"padding-ignored"})
    slot[outside] = AIR_HU
    return frozenset({"padding"})
