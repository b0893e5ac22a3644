"""The slice operator of a protocol, fitted where both series of a pair exist, for use on other patients.

A profile is only worth what its residual is: the same fit gives the RMS by which a *true* thin series misses the thick
one, pixel by pixel, and that is the agreement to ask of a generated one. Less would leave measured facts unused, more
would fit noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from latentcache.errors import InputError
from latentcache.records import PairRecord, SeriesRecord
from pipeline.consistency import residual_rms
from pipeline.profile_fit import fit_profile
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.volume import SeriesPointer, Volume

SUSPECT_RATIO = 1.5
"""Residual of true thin series under a profile, over that under the fit, from which on the profile is called wrong."""
MAX_PEERS = 3
"""Pairs that a protocol is fitted on; more change little and each must be read."""


@dataclass(frozen=True)
class ProtocolFit:
    """Slice profile of a protocol and the residual in HU of true thin series under it; ``stated_rms_hu`` is their
    residual under the box of the stated slice thickness, ``thickness_mm``."""

    profile: SliceProfile
    noise_hu: float
    thickness_mm: float = 0.0
    stated_rms_hu: float = 0.0

    def said_of(self, assumed: SliceProfile, true_rms_hu: float) -> str:
        """Why a profile is in doubt under which true thin series miss the thick ones by ``true_rms_hu``; empty where
        it explains them as well as the fit does."""
        if true_rms_hu <= SUSPECT_RATIO * self.noise_hu:
            return ""
        return (
            f"{assumed} is not this protocol's slice profile: true thin series miss the thick ones by "
            f"{true_rms_hu:.1f} HU under it, by {self.noise_hu:.1f} HU under {self.profile}"
        )

    @property
    def stated_is_wrong(self) -> str:
        """What to say where the stated slice thickness is not the profile; empty where it is."""
        if not self.stated_rms_hu:
            return ""
        return self.said_of(SliceProfile("box", self.thickness_mm), self.stated_rms_hu)


def fit_pair(thin: Volume, thick: Volume) -> ProtocolFit:
    """Fit one pair: width, blur and shift of the profile, then the residual over all columns and covered slices."""
    thick_z, thin_z = np.asarray(thick.geometry.z_mm), np.asarray(thin.geometry.z_mm)
    thickness = thick.geometry.thickness_mm or thick.geometry.spacing_mm_zyx[0]
    profile, _ = fit_profile(thin.hu, thick.hu, thick_z, thin_z, thickness, fit_shift=True, refine=True)
    noise, stated = (
        residual_rms(thin.hu, thick.hu, slice_operator(one, thick_z, thin_z))[0]
        for one in (profile, SliceProfile("box", thickness))
    )
    return ProtocolFit(profile, noise, thickness, stated)


def combined(fits: Sequence[ProtocolFit]) -> ProtocolFit:
    """One profile for a protocol: that of the fit with the median width, and the median residuals."""
    middle = sorted(fits, key=lambda fit: fit.profile.fwhm_mm)[(len(fits) - 1) // 2]
    noise, stated = np.median([(fit.noise_hu, fit.stated_rms_hu) for fit in fits], axis=0).tolist()
    return replace(middle, noise_hu=noise, stated_rms_hu=stated)


class Protocols:
    """Fits each protocol once, when it is first asked for.

    Same protocol: equal kernel and thickness of the thick series. A pair never serves its own patient; training pairs
    alone are asked where there are any.
    """

    def __init__(
        self,
        pairs: Sequence[PairRecord],
        series: Mapping[str, SeriesRecord],
        pointer: Callable[[str], SeriesPointer],
        read: Callable[[SeriesPointer], Volume],
    ) -> None:
        # Resampled in plane, a thick series fits a little worse than its protocol's own slices do.
        self._pairs = [p for p in pairs if p.status == "ok" and not p.across_fields]
        self._series, self._pointer, self._read = series, pointer, read
        self._fits: dict[str, ProtocolFit | None] = {}

    def peers(self, pair: PairRecord) -> list[PairRecord]:
        """Up to ``MAX_PEERS`` other patients' pairs of the same protocol, always the same ones."""
        same = [
            p for p in self._pairs if p.patient_key != pair.patient_key and self._protocol(p) == self._protocol(pair)
        ]
        return sorted([p for p in same if p.split == "train"] or same, key=lambda p: p.pair_key)[:MAX_PEERS]

    def fit(self, pair: PairRecord) -> ProtocolFit | None:
        """The protocol's fit from other patients; None where there are none that can be read."""
        fits = [fit for fit in map(self._fitted, self.peers(pair)) if fit is not None]
        return combined(fits) if fits else None

    def _protocol(self, pair: PairRecord) -> tuple[str, float]:
        thick = self._series[pair.thick_key]
        return thick.kernel, round(thick.thickness_mm, 2)

    def _fitted(self, pair: PairRecord) -> ProtocolFit | None:
        if pair.pair_key not in self._fits:
            try:
                thin, thick = (self._read(self._pointer(key)) for key in (pair.thin_key, pair.thick_key))
                self._fits[pair.pair_key] = fit_pair(thin, thick)
            except InputError:
                self._fits[pair.pair_key] = None  # a peer whose archive is gone or broken simply does not count
        return self._fits[pair.pair_key]
