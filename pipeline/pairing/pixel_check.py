"""The pixel proof of a pair: the thin series, averaged over the slice profile, must reproduce the thick one.

Headers can lie (a copied frame of reference, a wrong series beside the right one); pixels cannot. Both volumes are
averaged over in-plane blocks of a few millimetres, which commutes with averaging along z, suppresses noise, and leaves
the anatomy that another scan, breath-hold or contrast phase would change.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.forward_model import SliceProfile, fit_profile, measurement_noise, slice_operator
from pipeline.volume import Volume, onto_field

BLOCK_MM = 4.0
MAX_BLOCK_PIXELS = 16
STRUCTURE_SHARE = 0.12
"""Residual allowed as a share of the anatomy's own standard deviation. A true pair shows 0.02-0.05 (the profile is
never exactly known), the same pair moved by one 0.45 mm pixel 0.28, by half a thick slice 0.8, another scan over 1."""
NOISE_FACTOR = 1.0
MAX_SHIFT_OF_THICKNESS = 0.5
"""The fitted profile may sit off its stated position by up to half a thickness; beyond, positions are wrong."""
MIN_SLICES = 3
BODY_HU = -300.0
NOISE_SLICES = 16


@dataclass(frozen=True)
class PairProof:
    """Outcome of the pixel proof. HU unless stated otherwise; ``reason`` is empty when ``ok``.

    Attributes:
        profile: The slice profile that explains the thick series best.
        residual_hu: RMS(A thin - thick) of block means within the body.
        threshold_hu: What was allowed, from the anatomy's contrast and the measured noise.
        structure_hu: Standard deviation of the thick series' block means within the body.
        noise_hu: Noise expected in one pixel of the difference.
        slices: Thick slices that the thin series covers.
        evidence: The same as a JSON-ready dict, for the pair's row.
    """

    ok: bool
    reason: str
    profile: SliceProfile | None
    residual_hu: float
    threshold_hu: float
    structure_hu: float
    noise_hu: float
    slices: int

    @property
    def evidence(self) -> dict[str, Any]:
        def rounded(value: Any) -> Any:
            return round(value, 4) if isinstance(value, float) else value

        facts = {k: rounded(v) for k, v in asdict(self).items() if k != "profile"}
        if self.profile is None:
            return {**facts, "profile": None}
        fields = ("kind", "fwhm_mm", "blur_mm", "shift_mm")
        return {**facts, "profile": {name: rounded(getattr(self.profile, name)) for name in fields}}


def prove_pair(thick: Volume, thin: Volume) -> PairProof:
    """Whether ``thin`` averaged over the best-fitting slice profile reproduces ``thick`` within noise.

    Args:
        thick: (z, y, x) HU; on another in-plane grid than ``thin`` it is resampled onto that by physical position.
        thin: (z, y, x) HU.
    """
    try:
        thick = onto_field(thick, thin.geometry)
    except InputError as error:
        return _refused(error.found)
    z_thick, z_thin = np.asarray(thick.geometry.z_mm), np.asarray(thin.geometry.z_mm)
    spacing = thick.geometry.spacing_mm_zyx
    thickness = thick.geometry.thickness_mm or spacing[0]
    block = int(np.clip(round(BLOCK_MM / spacing[1]), 1, MAX_BLOCK_PIXELS))
    y, x = _block_means(thick.hu, block), _block_means(thin.hu, block)

    first = slice_operator(SliceProfile("box", thickness), z_thick, z_thin)
    if int(first.covered.sum()) < MIN_SLICES:
        return _refused(f"the thin series covers {int(first.covered.sum())} thick slices, fewer than {MIN_SLICES}")
    profile, _ = fit_profile(x, y, z_thick, z_thin, thickness, fit_shift=True)
    operator = slice_operator(profile, z_thick, z_thin)
    rows = operator.covered
    model, seen = operator.apply(x)[rows], y[rows]
    body = np.maximum(model, seen) > BODY_HU
    if not body.any():
        body = np.ones_like(body)
    residual = float(np.sqrt(np.mean(np.square(model[body] - seen[body], dtype=np.float64))))
    structure = float(np.std(seen[body], dtype=np.float64))
    noise = float(
        np.hypot(
            measurement_noise(_some(thick.hu)),
            measurement_noise(_some(thin.hu)) * np.sqrt(np.mean((operator.matrix[rows] ** 2).sum(axis=1))),
        )
    )
    # Noise of a block mean lies between noise / block (white) and noise (fully correlated): their geometric mean.
    threshold = float(np.hypot(STRUCTURE_SHARE * structure, NOISE_FACTOR * noise / np.sqrt(block)))
    reason = ""
    if residual > threshold:
        reason = (
            f"the thin series does not average to the thick one: {residual:.1f} HU apart, {threshold:.1f} HU allowed"
        )
    elif abs(profile.shift_mm) > MAX_SHIFT_OF_THICKNESS * thickness:
        reason = f"the thick slices fit only when moved by {profile.shift_mm:+.1f} mm: the positions are wrong"
    return PairProof(
        ok=not reason,
        reason=reason,
        profile=profile,
        residual_hu=residual,
        threshold_hu=threshold,
        structure_hu=structure,
        noise_hu=noise,
        slices=int(rows.sum()),
    )


def _refused(reason: str) -> PairProof:
    return PairProof(False, reason, None, 0.0, 0.0, 0.0, 0.0, 0)


def _block_means(hu: NDArray[Any], block: int) -> NDArray[np.float32]:
    """(z, y, x) to means over in-plane blocks, float32; an incomplete last block is left out."""
    rows, columns = (n // block * block for n in hu.shape[1:])
    out = np.empty((len(hu), rows // block, columns // block), dtype=np.float32)
    for i, image in enumerate(hu):
        tiles = image[:rows, :columns].reshape(rows // block, block, columns // block, block)
        tiles.mean(axis=(1, 3), dtype=np.float32, out=out[i])
    return out


def _some(hu: NDArray[Any]) -> NDArray[Any]:
    """About NOISE_SLICES slices, evenly spread: enough for a noise estimate."""
    return hu[:: max(1, len(hu) // NOISE_SLICES)]
