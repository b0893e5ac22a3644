"""The slice operator of a protocol, fitted where both series of a pair exist, for use on other patients.

A profile is only worth what its residual is: the same fit gives the RMS by which a *true* thin series misses the thick
one, pixel by pixel, and that is the agreement to ask of a generated one. Less would leave measured facts unused, more
would fit noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from latentcache.errors import InputError
from latentcache.records import PairRecord, SeriesRecord
from pipeline.consistency import residual_rms
from pipeline.profile_fit import fit_profile
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.volume import SeriesPointer, Volume

MAX_PEERS = 3
"""Pairs that a protocol is fitted on; more change little and each must be read."""


@dataclass(frozen=True)
class ProtocolFit:
    """Slice profile of a protocol and the residual in HU of true thin series under it."""

    profile: SliceProfile
    noise_hu: float


def fit_pair(thin: Volume, thick: Volume) -> ProtocolFit:
    """Fit one pair: width, blur and shift of the profile, then the residual over all columns and covered slices."""
    thick_z, thin_z = np.asarray(thick.geometry.z_mm), np.asarray(thin.geometry.z_mm)
    thickness = thick.geometry.thickness_mm or thick.geometry.spacing_mm_zyx[0]
    profile, _ = fit_profile(thin.hu, thick.hu, thick_z, thin_z, thickness, fit_shift=True, refine=True)
    noise, _ = residual_rms(thin.hu, thick.hu, slice_operator(profile, thick_z, thin_z))
    return ProtocolFit(profile, noise)


def combined(fits: Sequence[ProtocolFit]) -> ProtocolFit:
    """One profile for a protocol: that of the fit with the median width, and the median residual."""
    middle = sorted(fits, key=lambda fit: fit.profile.fwhm_mm)[(len(fits) - 1) // 2]
    return ProtocolFit(middle.profile, float(np.median([fit.noise_hu for fit in fits])))


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
        self._pairs = [p for p in pairs if p.status == "ok"]
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
