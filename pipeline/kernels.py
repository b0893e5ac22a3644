"""How alike two reconstruction kernels are, from ConvolutionKernel (0018,1210), whose spelling is the vendor's own."""

from __future__ import annotations

import re

UNKNOWN = 0.5
"""Similarity where either series names no kernel: neither proof nor objection."""
SAME_FAMILY = 0.75

_PARTS = re.compile(r"^([A-Z]+)\s*(\d+)?([A-Z]*)")


def kernel_similarity(one: str, other: str) -> float:
    """1 for the same kernel, down to 0 for another family; 0.5 where unknown.

    Spelling is compared without case and white space, and so are the parts of a multi-valued kernel (iterative
    strength such as ``I31f\\2``). Numbered kernels of one family (Siemens ``B30f`` and ``B45f``, Canon ``FC03`` and
    ``FC51``) lose with the distance of their numbers, which order them from smooth to sharp.
    """
    a, b = _normalised(one), _normalised(other)
    if not a or not b:
        return UNKNOWN
    if a == b:
        return 1.0
    first, second = _PARTS.match(a.split("\\")[0]), _PARTS.match(b.split("\\")[0])
    if not first or not second or first[1] != second[1] or first[2] is None or second[2] is None:
        return 0.0
    return max(0.0, SAME_FAMILY - abs(int(first[2]) - int(second[2])) / 20.0)


def _normalised(kernel: str) -> str:
    return re.sub(r"\s+", "", kernel).upper()
