"""A thick series that was never scanned: how it follows from a thin one, in full, so that it can be made when read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

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
        kernel_pixels, kernel_gain: The thick series' other reconstruction kernel: ``1 + gain`` times the slice less
            ``gain`` times itself blurred by a Gaussian of this standard deviation in pixels. A gain of -1 is that blur,
            a positive one sharpens; with 0 both series have one kernel.
    """

    profile: str
    thickness_mm: float
    z_mm: tuple[float, ...]
    first: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    noise_hu: float = 0.0
    seed: int = 0
    kernel_pixels: float = 0.0
    kernel_gain: float = 0.0

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
            mean = self._as_reconstructed(mean)
            hu[k] = np.clip(np.rint(mean + self._noise(rng, mean.shape)), -32768, 32767)
        header = replace(thin.header, sop_instance_uids=())
        flags = (*thin.flags, SIMULATED_FLAG)
        return replace(thin, hu=hu, geometry=self.geometry(thin.geometry), header=header, flags=flags)

    def _as_reconstructed(self, mean: NDArray[np.float32]) -> NDArray[np.float32]:
        """A slice under the thick series' own kernel."""
        if not self.kernel_gain or self.kernel_pixels <= 0:
            return mean
        kernel = _gaussian(self.kernel_pixels)
        blurred = _filtered(mean, kernel / kernel.sum(), "edge")
        return np.asarray(mean + np.float32(self.kernel_gain) * (mean - blurred), np.float32)

    def _noise(self, rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
        white = rng.standard_normal(shape, dtype=np.float32)
        kernel = _gaussian(BLUR_PIXELS)
        kernel /= np.linalg.norm(kernel)  # the sum of independent values keeps its variance
        return np.asarray(_filtered(white, kernel, "wrap") * np.float32(self.noise_hu), np.float32)

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SimulatedThick:
        """Return what `to_json` wrote."""
        raw: dict[str, Any] = json.loads(text)
        weights = tuple(tuple(row) for row in raw.pop("weights"))
        return cls(z_mm=tuple(raw.pop("z_mm")), first=tuple(raw.pop("first")), weights=weights, **raw)


def _gaussian(pixels: float) -> NDArray[np.float32]:
    """Values of a Gaussian to at least four of its standard deviations, not normalised."""
    far = math.ceil(4 * pixels)
    return np.asarray(np.exp(-0.5 * (np.arange(-far, far + 1) / pixels) ** 2), np.float32)


def _filtered(image: NDArray[np.float32], kernel: NDArray[np.float32], mode: Literal["edge", "wrap"]) -> NDArray[Any]:
    """An image filtered along rows and columns by an odd kernel."""
    rows, columns = image.shape
    padded = np.pad(image, len(kernel) // 2, mode=mode)
    along = sum(w * padded[i : i + rows] for i, w in enumerate(kernel))
    return np.asarray(sum(w * along[:, i : i + columns] for i, w in enumerate(kernel)))
