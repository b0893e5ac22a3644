"""Scores of one held-out pair: every method on the thin grid, inside the extent that the thick series covers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.forward_model import SliceOperator, residual_rms
from pipeline.metrics import (
    LAA_THRESHOLD_HU,
    Edges,
    FeaturesOf,
    Similarity,
    Structure,
    find_edges,
    intensity as metrics,
    lung_density,
    lung_mask,
    measurable,
    noise_texture,
    null_space_figures,
    perceptual_distance,
    sharpness,
    similarities,
    slice_inconsistency,
    volume_errors,
)
from pipeline.volume import Geometry, Window

FULL_RANGE_HU = (-1024.0, 2048.0)
"""The range of the literature's figures (RPLHR-CT: 3072 HU)."""


@dataclass(frozen=True)
class CaseScores:
    """Scores of one pair. ``scores[method]`` has psnr_db and ssim in the window, mae_hu there, and bias by tissue.

    Identical volumes have no PSNR: ``psnr_db`` is None and ``identical`` true. A method that could not be scored is
    in ``failures`` with its reason and never in a mean; ``notes`` says what is peculiar about the case itself.
    """

    key: str
    category: str
    slices: int
    scores: dict[str, dict[str, Any]]
    failures: dict[str, str]
    consistency: dict[str, Any]
    patient: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A case's truth, which its methods are scored against.

    Attributes:
        truth: (z, y, x) HU.
        geometry: Grid of ``truth``.
        thick_z_mm: Positions of the thick slices.
        operator: A from ``geometry`` to the thick slices; None leaves out the null space and the misfit.
        thick: The thick series' HU, (k, y, x); None leaves out the misfit to it.
        structures: Nodules and vessels of known volume; none where nothing is known, as in patients.
        features: Feature maps for the perceptual distance; None leaves it out.
    """

    truth: NDArray[Any]
    geometry: Geometry | None = None
    thick_z_mm: tuple[float, ...] = ()
    operator: SliceOperator | None = None
    thick: NDArray[Any] | None = None
    structures: tuple[Structure, ...] = ()
    features: FeaturesOf | None = None
    clipped: dict[tuple[float, float], NDArray[Any]] = field(default_factory=dict, repr=False)
    lung: list[NDArray[np.bool_]] = field(default_factory=list, repr=False)
    own: dict[Any, Any] = field(default_factory=dict, repr=False)

    def within(self, low: float, high: float) -> NDArray[Any]:
        """The truth clipped to a range, made once."""
        if (low, high) not in self.clipped:
            self.clipped[low, high] = _clip(self.truth, low, high)
        return self.clipped[low, high]

    def lung_mask(self) -> NDArray[np.bool_]:
        """The truth's lung, found once."""
        if not self.lung:
            self.lung.append(lung_mask(self.truth))
        return self.lung[0]

    def classes(self, window: Window) -> NDArray[np.uint8]:
        """The tissue class of every true voxel, found once."""
        if ("classes", window) not in self.own:
            self.own["classes", window] = metrics.tissue_classes(self.within(window.lower, window.upper))
        found: NDArray[np.uint8] = self.own["classes", window]
        return found

    def edges(self, window: Window) -> tuple[Edges, float]:
        """The truth's edges along z and their width in mm, found once.

        Raises:
            InputError: There are too few.
        """
        assert self.geometry is not None
        if ("edges", window) not in self.own:
            truth = self.within(window.lower, window.upper)
            low, high = max(window.lower, -850.0), min(40.0, window.upper)
            found = find_edges(truth, self.geometry.spacing_mm_zyx[0], low_hu=low, high_hu=high)
            self.own["edges", window] = (found, sharpness(truth, found).width_mm)
        answer: tuple[Edges, float] = self.own["edges", window]
        return answer

    def misfit_hu(self, volume: NDArray[Any]) -> tuple[float, float]:
        """RMS(A x - y) in HU of an answer and, measured once, of the truth.

        Raises:
            InputError: The thick series or its operator is not at hand.
        """
        if self.operator is None or self.thick is None or not self.operator.covered.any():
            raise InputError("no slice operator", expected="thick slices within the thin grid", remedy="None.")
        if "misfit" not in self.own:
            self.own["misfit"] = residual_rms(self.truth, self.thick, self.operator)[0]
        return residual_rms(volume, self.thick, self.operator)[0], self.own["misfit"]

    def volumes(self, hu: NDArray[Any]) -> dict[str, Any]:
        """Volumetry of the known structures in an answer and, measured once, in the truth.

        Raises:
            InputError: No structure is known.
        """
        if self.geometry is not None and "structures" not in self.own:
            self.own["structures"] = measurable(self.truth, self.geometry, self.structures)
            self.own["volumes"] = volume_errors(self.truth, self.geometry, self.own["structures"])
        if self.geometry is None or not self.own["structures"]:
            raise InputError("no structure of known volume", expected="a phantom", remedy="None for patients.")
        return {**volume_errors(hu, self.geometry, self.own["structures"]), "truth": self.own["volumes"]}


def score(
    key: str,
    category: str,
    truth: NDArray[Any],
    methods: Mapping[str, NDArray[Any]],
    window: Window,
    consistency: Mapping[str, Any] | None = None,
) -> CaseScores:
    """Score volumes (z, y, x) in HU against the truth, inside the window (both clipped; data range = width)."""
    case = Case(truth)
    scores: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    for name, volume in methods.items():
        try:
            scores[name] = score_method(volume, case, window)
        except InputError as error:
            failures[name] = str(error)
    return CaseScores(key, category, len(truth), scores, failures, dict(consistency or {}), notes=notes_on(truth))


def score_method(volume: NDArray[Any], case: Case, window: Window, *, whole_range: bool = True) -> dict[str, Any]:
    """Every figure of one method. What a case does not allow is in ``not_measured`` with the reason.

    Args:
        whole_range: False for a decoded latent that nothing was restored in: outside the window it means nothing.

    Raises:
        InputError: Another shape than the truth's, or values that are not finite: nothing of it can be scored.
    """
    metrics.check(volume, case.truth)
    clipped, truth = _clip(volume, window.lower, window.upper), case.within(window.lower, window.upper)
    alike = similarities(clipped, truth, data_range=window.width)
    out = _basic(clipped, truth, window.width, alike, case.classes(window))
    if whole_range:
        whole = metrics.mean_squared_error(volume, case.truth, between=FULL_RANGE_HU)
        span = FULL_RANGE_HU[1] - FULL_RANGE_HU[0]
        out["psnr_3072_db"] = 10 * math.log10(span**2 / whole) if whole else None
    if case.geometry is None:
        return out
    missing: dict[str, str] = {}
    for name, measure in _further(volume, clipped, case, window, whole_range, alike).items():
        try:
            out[name] = measure()
        except InputError as error:
            missing[name] = str(error)
    out["not_measured"] = missing
    return out


def _basic(
    clipped: NDArray[Any],
    truth: NDArray[Any],
    width: float,
    alike: Similarity,
    classes: NDArray[np.uint8],
) -> dict[str, Any]:
    value = metrics.psnr(clipped, truth, data_range=width)
    return {
        "psnr_db": value if math.isfinite(value) else None,
        "identical": not math.isfinite(value),
        "ssim": alike.ssim,
        "mae_hu": metrics.mean_absolute_error(clipped, truth),
        "bias": metrics.bias_by_tissue(clipped, truth, classes),
    }


def _further(
    volume: NDArray[Any],
    clipped: NDArray[Any],
    case: Case,
    window: Window,
    whole_range: bool,
    alike: Similarity,
) -> dict[str, Callable[[], Any]]:
    """The figures that need geometry, to be called one by one."""
    geometry = case.geometry
    assert geometry is not None
    dz, dy, dx = geometry.spacing_mm_zyx
    truth = case.within(window.lower, window.upper)

    def ssim_3d() -> float:
        if alike.ssim_3d is None:
            raise InputError(f"{len(truth)} slices", expected="at least 11 for SSIM", remedy="Use another metric.")
        return alike.ssim_3d

    def lung() -> dict[str, float]:
        if window.lower > LAA_THRESHOLD_HU - 50:
            raise InputError(
                f"a window from {window.lower:g} HU", expected="one that holds lung", remedy="Encode with `lung`."
            )
        return asdict(lung_density(volume, case.lung_mask(), dz * dy * dx))

    def unseen() -> dict[str, float]:
        if case.operator is None or not case.operator.covered.any():
            raise InputError("no slice operator", expected="thick slices within the thin grid", remedy="None.")
        return asdict(null_space_figures(clipped, truth, case.operator))

    def whole() -> NDArray[Any]:
        if not whole_range:
            raise InputError("values beyond the window", expected="restored ones", remedy="None: this is a bound.")
        return volume

    def consistency() -> dict[str, float]:
        rms, own = case.misfit_hu(whole())
        return {"rms_hu": rms, "truth_rms_hu": own, "ratio": rms / own if own > 0 else float("nan")}

    def edges() -> dict[str, Any]:
        found_edges, own_width = case.edges(window)
        found = asdict(sharpness(clipped, found_edges))
        return {**found, "excess_mm": found["width_mm"] - own_width}

    return {
        "ssim_3d": ssim_3d,
        "ms_ssim": lambda: {"value": alike.ms_ssim, "scales": alike.scales},
        "phase": lambda: metrics.error_by_phase(clipped, truth, np.array(geometry.z_mm), np.array(case.thick_z_mm)),
        "slice_to_slice": lambda: slice_inconsistency(clipped, truth),
        "noise": lambda: noise_texture(clipped, truth, (dy, dx)),
        "sharpness_z": edges,
        "null_space": unseen,
        "consistency": consistency,
        "lung": lung,
        "volumetry": lambda: case.volumes(whole()),
        "perceptual": lambda: perceptual_distance(clipped, truth, window, case.features),
    }


def notes_on(truth: NDArray[Any]) -> tuple[str, ...]:
    """Return what a reader must know of the truth: constant slices are no anatomy and score too well."""
    constant = sum(1 for piece in truth if piece.min() == piece.max())
    return (f"{constant} of {len(truth)} true slices are constant",) if constant else ()


def failed(key: str, category: str, patient: str, reason: str) -> CaseScores:
    """A case of which nothing can be scored."""
    return CaseScores(key, category, 0, {}, {"case": reason}, {}, patient)


def finite(value: Any) -> Any:
    """The same document with None for numbers that JSON cannot hold (NaN, infinity)."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _clip(volume: NDArray[Any], low: float, high: float) -> NDArray[Any]:
    """The volume clipped; integers stay integers where the bounds are some, at half of float32's memory."""
    if np.issubdtype(volume.dtype, np.integer) and low == int(low) and high == int(high):
        return np.asarray(np.clip(volume, int(low), int(high)))
    return np.asarray(np.clip(volume, np.float32(low), np.float32(high)), dtype=np.float32)
