"""A thick series that was never scanned: how it follows from a thin one, in full, so that it can be made when read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.volume.geometry import Geometry
from pipeline.volume.volume import Volume

SIMULATED_FLAG = "simulated-thick"
"""Of a series that was computed from a thin one, and of nothing else."""
BLUR_PIXELS = 0.7
"""Standard deviation of the in-plane blur of added noise: CT noise is not white."""


@dataclass(frozen=True)
class SimulatedThick:
    """A drawn slice profile on a thin series' own slices.

    Attributes:
        profile: In words.
        thickness_mm: What a header would state.
        z_mm: (K,) positions along the normal, evenly spaced.
        first, weights: Thick slice k is the sum of ``weights[k]`` times the thin slices from ``first[k]`` on.
        noise_hu: Standard deviation of the noise that is added.
        seed: Of that noise.
    """

    profile: str
    thickness_mm: float
    z_mm: tuple[float, ...]
    first: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    noise_hu: float = 0.0
    seed: int = 0

    def geometry(self, thin: Geometry) -> Geometry:
        """The grid of the thick series."""
        return thin.with_z(list(self.z_mm), self.thickness_mm)

    def of(self, thin: Volume) -> Volume:
        """The thick series (K, y, x) int16, the same at every call."""
        rng = np.random.default_rng(self.seed)
        hu = np.empty((len(self.z_mm), *thin.hu.shape[1:]), np.int16)
        for k, (first, weights) in enumerate(zip(self.first, self.weights, strict=True)):
            own = thin.hu[first : first + len(weights)].astype(np.float32)
            mean = np.einsum("n,nyx->yx", np.asarray(weights, np.float32), own)
            hu[k] = np.clip(np.rint(mean + self._noise(rng, mean.shape)), -32768, 32767)
        header = replace(thin.header, sop_instance_uids=())
        flags = (*thin.flags, SIMULATED_FLAG)
        return replace(thin, hu=hu, geometry=self.geometry(thin.geometry), header=header, flags=flags)

    def _noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        white = rng.standard_normal(shape, dtype=np.float32)
        reach = np.arange(-3, 4)
        kernel = np.exp(-0.5 * (reach / BLUR_PIXELS) ** 2).astype(np.float32)
        kernel /= np.linalg.norm(kernel)  # the sum of independent values keeps its variance
        padded = np.pad(white, 3, mode="wrap")
        rows = sum(w * padded[i : i + shape[0]] for i, w in enumerate(kernel))
        blurred = sum(w * rows[:, i : i + shape[1]] for i, w in enumerate(kernel))
        return np.asarray(blurred * np.float32(self.noise_hu), np.float32)

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SimulatedThick:
        """What `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        weights = tuple(tuple(row) for row in raw.pop("weights"))
        return cls(z_mm=tuple(raw.pop("z_mm")), first=tuple(raw.pop("first")), weights=weights, **raw)
