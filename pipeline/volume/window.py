"""Hounsfield units to the unit interval [-1, 1] and back. Only the VAE module knows about [0, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import Encoding, InputError

BLEND_FRACTION = 0.025
"""Width of the blend at a window's edge, as a share of the window, where base is at the edge."""
BLEND_SLOPE = 0.15
"""Growth of the blend's width for each HU that base is beyond the edge."""


def blend_at_edges(decoded: NDArray[np.float32], base: NDArray[np.float32], window: Window) -> NDArray[np.float32]:
    """Blend decoded and interpolated HU where the window clipped; both (z, y, x), returns float32.

    At the window's lower edge L (and mirrored at the upper): a decoded value at L says only "L or below", so base
    answers, but never from inside the window: min(B, L). The weight of D rises smoothly from 0 at L to 1 at L + m.
    m widens with how far base is beyond the edge, because the further the measurement says "lung", the more a
    decoded value just inside the window is noise of the VAE or a partial volume, and the blend then is the partial
    volume. Both inputs enter continuously, so no step can appear; deep inside the window D passes unchanged.
    """
    out = np.array(decoded, dtype=np.float32)
    narrowest = np.float32(BLEND_FRACTION * window.width)
    for edge, sign in ((window.lower, 1.0), (window.upper, -1.0)):
        beyond = np.minimum(sign * (base - np.float32(edge)), 0.0)
        margin = narrowest - np.float32(BLEND_SLOPE) * beyond
        np.minimum(margin, np.float32(window.width / 2), out=margin)
        t = np.clip(sign * (decoded - np.float32(edge)) / margin, 0.0, 1.0)
        t = t * t * (3.0 - 2.0 * t)
        near = t < 1.0
        restored = np.float32(edge) + np.float32(sign) * beyond
        inside = np.maximum(sign * (decoded - np.float32(edge)), 0.0)
        kept = np.float32(edge) + np.float32(sign) * inside
        out = np.where(near, restored + t * (kept - restored), out)
    return out


NAMED_WINDOWS = {"soft-tissue": (40.0, 400.0), "maisi": (0.0, 2000.0), "lung": (-600.0, 1500.0)}


@dataclass(frozen=True)
class Window:
    """A display window in HU (DICOM PS3.3 C.11.2): values are clipped to center -/+ width / 2."""

    center: float = 40.0
    width: float = 400.0

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise InputError(f"window width {self.width}", expected="a width above 0 HU", remedy="Give --window C:W.")

    @property
    def lower(self) -> float:
        return self.center - self.width / 2

    @property
    def upper(self) -> float:
        return self.center + self.width / 2

    @classmethod
    def parse(cls, text: str) -> Window:
        """A name (soft-tissue, maisi, lung) or ``C:W``, e.g. ``40:400``."""
        if text in NAMED_WINDOWS:
            return cls(*NAMED_WINDOWS[text])
        try:
            center, width = (float(part) for part in text.split(":"))
        except ValueError:
            raise InputError(
                f"window {text!r}",
                expected=f"one of {', '.join(NAMED_WINDOWS)} or C:W in HU",
                remedy="For example --window soft-tissue or --window 40:400.",
            ) from None
        return cls(center, width)

    @classmethod
    def of(cls, encoding: Encoding) -> Window:
        """Return the window that an encoding's latents hold."""
        return cls(encoding.window_center, encoding.window_width)

    def to_unit(self, hu: NDArray[Any]) -> NDArray[np.float32]:
        """HU to [-1, 1], clipped; float32."""
        unit = hu.astype(np.float32)
        unit -= np.float32(self.center)
        unit *= np.float32(2.0 / self.width)
        return np.clip(unit, -1.0, 1.0, out=unit)

    def from_unit(self, unit: NDArray[Any]) -> NDArray[np.float32]:
        """[-1, 1] to HU, not clipped; float32."""
        hu = np.asarray(unit, dtype=np.float32) * np.float32(self.width / 2)
        hu += np.float32(self.center)
        return np.asarray(hu)
