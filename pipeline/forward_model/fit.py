"""Fit a slice profile where a pair exists, and notice a wrong one where only the thick slices do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from latentcache import InputError, PairRecord, SeriesRecord
from pipeline.forward_model.data_consistency import residual_rms
from pipeline.forward_model.slice_profile import SliceProfile, slice_operator
from pipeline.volume import SeriesPointer, Volume

SUSPECT_RATIO = 1.5
"""Residual of true thin series under a profile, over that under the fit, from which on the profile is called wrong."""
MAX_PEERS = 3
"""Pairs that a protocol is fitted on; more change little and each must be read."""


@dataclass(frozen=True)
class ProtocolFit:
    """Slice profile of a protocol and the residual in HU of true thin series under it.

    ``stated_rms_hu`` is their residual under the box of the stated slice thickness, ``thickness_mm``.
    """

    profile: SliceProfile
    noise_hu: float
    thickness_mm: float = 0.0
    stated_rms_hu: float = 0.0

    def said_of(self, assumed: SliceProfile, true_rms_hu: float) -> str:
        """Why a profile is in doubt under which true thin series miss the thick ones by ``true_rms_hu``.

        Empty where it explains them as well as the fit does.
        """
        if true_rms_hu <= SUSPECT_RATIO * self.noise_hu:
            return ""
        return (
            f"{assumed} is not this protocol's slice profile: true thin series miss the thick ones by "
            f"{true_rms_hu:.1f} HU under it, by {self.noise_hu:.1f} HU under {self.profile}"
        )

    @property
    def stated_is_wrong(self) -> str:
        """Return a note where the stated slice thickness is not the profile; empty where it is."""
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

    Same protocol: equal kernel and thickness of the thick series. A pair never serves the patient it came from;
    training pairs alone are asked where there are any.
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
            p
            for p in self._pairs
            if p.patient_key != pair.patient_key
            and p.simulated == pair.simulated
            and self._protocol(p) == self._protocol(pair)
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


MAX_COLUMNS = 10_000
"""Columns that a fit looks at; more change nothing."""
SUSPECT_IMPROVEMENT = 0.15
"""A rival profile that lowers the residual by this share or more puts the assumed one in doubt."""


Verdict = Literal["agrees", "shifted", "wider", "narrower-or-smoothed"]


@dataclass(frozen=True)
class OperatorCheck:
    """Whether the residual has a structure that another profile would explain.

    Attributes:
        verdict: ``agrees``, or how the best rival differs: ``shifted``, ``wider``, or ``narrower-or-smoothed`` (thin
            slices that are smoother than the anatomy favour a narrower profile too, so that the two look alike).
        assumed: The profile in use, and ``rms_assumed`` its RMS(A x - y) in HU.
        best: The best rival, and ``rms_best`` its residual.
        message: For a reader; empty when nothing is suspect.
    """

    verdict: Verdict
    assumed: SliceProfile
    rms_assumed: float
    best: SliceProfile
    rms_best: float
    message: str

    @property
    def suspect(self) -> bool:
        return self.verdict != "agrees"


def sample_columns(thin: NDArray[Any], thick: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The columns that vary most along z in ``thick``, as (n, columns); flat ones tell nothing of a profile."""
    stride = max(1, int(np.ceil(np.sqrt(thick.shape[1] * thick.shape[2] / (4 * MAX_COLUMNS)))))
    y = thick[:, ::stride, ::stride].reshape(len(thick), -1).astype(np.float32)
    x = thin[:, ::stride, ::stride].reshape(len(thin), -1).astype(np.float32)
    keep = np.argsort(y.std(axis=0))[-MAX_COLUMNS:]
    return x[:, keep], y[:, keep]


@dataclass(frozen=True)
class Columns:
    """Second moments of sampled columns, from which the residual of any operator follows without the columns.

    Mean over columns of x x^T (n_thin, n_thin), y x^T (n_thick, n_thin) and y^2 (n_thick), all float64: the residual
    is a small difference of large numbers.
    """

    xx: NDArray[np.float64]
    yx: NDArray[np.float64]
    yy: NDArray[np.float64]
    thick_z_mm: NDArray[np.float64]
    thin_z_mm: NDArray[np.float64]

    @classmethod
    def of(cls, thin: NDArray[Any], thick: NDArray[Any], thick_z_mm: NDArray[Any], thin_z_mm: NDArray[Any]) -> Columns:
        """Of the columns of (z, y, x) volumes that vary most along z."""
        x32, y32 = sample_columns(thin, thick)
        x, y = x32.astype(np.float64), y32.astype(np.float64)
        # HU around 0 keeps the moments small; every operator's rows sum to 1, so that a common offset drops out.
        offset = y.mean()
        x, y = x - offset, y - offset
        n = x.shape[1]
        z_thick, z_thin = np.asarray(thick_z_mm, np.float64), np.asarray(thin_z_mm, np.float64)
        return cls(x @ x.T / n, y @ x.T / n, (y**2).mean(axis=1), z_thick, z_thin)

    def rms(self, profile: SliceProfile, use: NDArray[np.bool_] | None = None) -> float:
        """RMS(A x - y) in HU of a profile over the slices it is judged by; infinite where no thick slice is covered."""
        operator = slice_operator(profile, self.thick_z_mm, self.thin_z_mm)
        rows = operator.judged if use is None else operator.covered & use
        if not rows.any():
            return float("inf")
        a = operator.matrix[rows]
        squares = np.einsum("ij,jk,ik->i", a, self.xx, a, optimize=True) - 2 * (a * self.yx[rows]).sum(axis=1)
        return float(np.sqrt(max(0.0, float(np.mean(squares + self.yy[rows])))))


def candidate_profiles(thickness_mm: float) -> Iterable[SliceProfile]:
    """Boxes, blurred boxes and Gaussians from 0.6 to 1.8 times the thickness."""
    for factor in np.arange(0.6, 1.81, 0.1):
        width = float(factor * thickness_mm)
        yield SliceProfile("box", width)
        yield SliceProfile("gaussian", width)
        yield SliceProfile("box", width, blur_mm=0.4 * thickness_mm)


def fit_profile(
    thin: NDArray[Any],
    thick: NDArray[Any],
    thick_z_mm: NDArray[Any],
    thin_z_mm: NDArray[Any],
    thickness_mm: float,
    *,
    fit_shift: bool = False,
    refine: bool = False,
) -> tuple[SliceProfile, float]:
    """The profile under which ``thin`` (z, y, x) HU best reproduces ``thick``, and its RMS residual in HU.

    ``refine``: from the best of the grid on, move width, blur and (with ``fit_shift``) shift freely.
    """
    columns = Columns.of(thin, thick, thick_z_mm, thin_z_mm)
    best, rms = _search(columns, thickness_mm, fit_shift)
    return _refined(columns, best, rms, thickness_mm, fit_shift) if refine else (best, rms)


def check_operator(
    thin: NDArray[Any],
    thick: NDArray[Any],
    thick_z_mm: NDArray[Any],
    thin_z_mm: NDArray[Any],
    assumed: SliceProfile,
    noise_hu: float,
) -> OperatorCheck:
    """Compare the assumed profile with rivals on slices that must not have been projected with it.

    A thin series that is itself too smooth also favours a narrower profile, so the message names both readings.
    """
    columns = Columns.of(thin, thick, thick_z_mm, thin_z_mm)
    best, rms_best = _search(columns, assumed.fwhm_mm, True)
    rms = columns.rms(assumed)
    verdict: Verdict = "agrees"
    if rms > noise_hu and rms_best < (1 - SUSPECT_IMPROVEMENT) * rms:
        if abs(best.shift_mm - assumed.shift_mm) >= 0.2 * assumed.fwhm_mm:
            verdict = "shifted"
        else:
            verdict = "wider" if _width(best) > _width(assumed) else "narrower-or-smoothed"
    reading = {
        "agrees": "",
        "shifted": "the slice positions or the profile's centre are wrong",
        "wider": "the profile is wider than assumed",
        "narrower-or-smoothed": "the profile is narrower than assumed, or the thin slices are smoother than life",
    }[verdict]
    message = (
        f"{best} explains the thick slices better ({rms_best:.1f} HU) than {assumed} ({rms:.1f} HU): {reading}"
        if reading
        else ""
    )
    return OperatorCheck(verdict, assumed, rms, best, rms_best, message)


def _width(profile: SliceProfile) -> float:
    """Standard deviation of the profile in mm: one measure for boxes, blurred boxes and Gaussians."""
    edge = 4 * (profile.fwhm_mm + profile.blur_mm)
    u = np.linspace(-edge, edge, 2001) + profile.shift_mm
    h = np.diff(profile.cumulative(u))
    middle = (u[1:] + u[:-1]) / 2 - profile.shift_mm
    return float(np.sqrt(np.sum(h * middle**2) / np.sum(h)))


def _search(columns: Columns, thickness_mm: float, fit_shift: bool) -> tuple[SliceProfile, float]:
    use = _common_rows(columns, thickness_mm)

    def rms(profile: SliceProfile) -> float:
        return columns.rms(profile, use)

    best = min(candidate_profiles(thickness_mm), key=rms)
    if fit_shift:
        z = columns.thin_z_mm
        step = float(np.mean(np.diff(z))) if len(z) > 1 else thickness_mm / 5
        shifts = np.arange(-0.6 * thickness_mm, 0.6 * thickness_mm + step / 4, step / 2)
        coarse = min((SliceProfile("box", thickness_mm, shift_mm=float(s)) for s in shifts), key=rms)
        again = (SliceProfile(p.kind, p.fwhm_mm, p.blur_mm, coarse.shift_mm) for p in candidate_profiles(thickness_mm))
        best = min((best, *again), key=rms)
    return best, rms(best)


def _common_rows(columns: Columns, thickness_mm: float) -> NDArray[np.bool_]:
    """Slices that the widest candidate still covers: on fewer rows a narrow one would win by the rows that it lost."""
    widest = SliceProfile("box", 2.0 * thickness_mm)
    use = slice_operator(widest, columns.thick_z_mm, columns.thin_z_mm).judged
    return use if use.any() else np.ones(len(use), dtype=bool)


def _refined(
    columns: Columns, start: SliceProfile, rms: float, thickness_mm: float, fit_shift: bool
) -> tuple[SliceProfile, float]:
    """Nelder-Mead from the best of the grid; keeps the start where that is no better."""
    use = _common_rows(columns, thickness_mm)

    def profile(p: NDArray[np.float64]) -> SliceProfile:
        blur = abs(float(p[1])) if start.kind == "box" else 0.0
        shift = float(p[2]) if fit_shift else start.shift_mm
        return SliceProfile(start.kind, max(float(p[0]), 0.1 * thickness_mm), blur, shift)

    found = minimize(
        lambda p: columns.rms(profile(p), use),
        np.array([start.fwhm_mm, start.blur_mm, start.shift_mm]),
        method="Nelder-Mead",
        options={"xatol": 0.01, "fatol": 0.005, "maxiter": 200},
    )
    return (profile(found.x), float(found.fun)) if found.fun < rms else (start, rms)
