"""A stack: the slices of one volume while it is being assembled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.geometry import Geometry
from pipeline.instance import Instance

SAME_POSITION_MM = 0.01
POSITION_TOLERANCE_MM = 0.06
"""Positions are often rounded to 0.1 mm: deviations up to here are rounding, not geometry."""
SPACING_TOLERANCE = 0.02
THIN_BELOW_MM = 2.5
"""Spacing and thickness below which a series is a thin one."""


@dataclass
class Stack:
    """Slices of one volume, ascending along the slice normal once `assembly.order` has run."""

    instances: list[Instance]
    discriminator: str = ""
    role: str = ""
    status: str = "ok"
    reason: str = ""
    flags: list[str] = field(default_factory=list)
    geometry: Geometry | None = None

    def set_aside(self, reason: str) -> Stack:
        self.role, self.reason = "other", reason
        return self

    def quarantine(self, reason: str) -> Stack:
        self.role, self.status, self.reason = "other", "quarantined", reason
        return self

    def flag(self, name: str) -> None:
        if name not in self.flags:
            self.flags.append(name)


def normal_of(orientation: Sequence[float]) -> NDArray[np.float64]:
    """Unit slice normal: row direction x column direction (PS3.3 C.7.6.2.1.1). Not writeable."""
    return _normal(tuple(orientation))


@lru_cache(maxsize=256)
def _normal(orientation: tuple[float, ...]) -> NDArray[np.float64]:
    """Remembered: every slice of a series asks with the same six numbers."""
    normal = np.cross(orientation[:3], orientation[3:])
    normal = np.asarray(normal / np.linalg.norm(normal), dtype=np.float64)
    normal.flags.writeable = False
    return normal


def heights(instances: Sequence[Instance]) -> NDArray[np.float64]:
    """Positions along the first slice's normal in mm; every instance must have a position."""
    normal = normal_of(instances[0].orientation or ())
    return np.asarray([one.position for one in instances], dtype=np.float64) @ normal


def is_even(z: NDArray[np.float64]) -> bool:
    """Whether ascending positions are evenly spaced, up to rounding. The whole run counts, not neighbours."""
    if len(z) < 3:
        return True
    steps = np.diff(z)
    residual = float(np.abs(z - z[0] - steps.mean() * np.arange(len(z))).max())
    return residual <= max(POSITION_TOLERANCE_MM, SPACING_TOLERANCE * float(np.median(steps)))
