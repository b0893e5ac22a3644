"""From a decoded latent to HU worth writing: the clipped range restored, and agreement with the measured slices.

Legend: decoded (D): what the VAE gave, base (B): thick HU interpolated along z onto the target's positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError, NonFiniteError
from pipeline.forward_model import (
    OperatorCheck,
    ProjectionFigures,
    SliceProfile,
    ThickMeasurement,
    certificate,
    check_operator,
    enforce_data_consistency,
    residual_rms,
)
from pipeline.volume import (
    Geometry,
    Volume,
    Window,
    ZMethod,
    blend_at_edges,
    interpolated,
    interpolated_onto,
    row_blocks,
)

if TYPE_CHECKING:
    from pipeline.forward_model import ProtocolFit
    from pipeline.metrics import Texture
    from pipeline.refiner import RefinerFile


UNMET = 1.5
"""Residual over the noise from which on a projection has failed, and the operator is in doubt."""
SPOKEN_HU = 0.5
"""A decoded value closer than this to interpolation says nothing."""


Detail = Literal["absolute", "residual"]


def parse_detail(text: str) -> Detail:
    """``absolute`` or ``residual``, from the command line."""
    if text == "absolute":
        return "absolute"
    if text == "residual":
        return "residual"
    raise InputError(f"detail {text!r}", expected="absolute or residual", remedy="Give --detail residual.")


@dataclass(frozen=True)
class ComposeSettings:
    """Settings of the way from decoded slices to HU.

    Attributes:
        detail: ``residual``: B + (D - D of the condition), which cancels the VAE's own round-trip error; where no
            decoded condition is at hand, and with ``absolute``, D is taken as it is. On phantoms through the tiny VAE,
            with the true latent, in 40/400 HU: absolute 20.9 dB, residual 28.5 dB, the VAE's own ceiling 20.8 dB.
        consistency: Whether to project onto the measured slices.
        profile: Slice profile of the thick series; None for the box of its slice thickness.
        noise_hu: Residual to aim for; None for the noise of the thick slices. A profile fitted on a pair comes with
            the residual of that pair's true thin series, which also holds what no profile explains.
        base_method: Interpolation along z for B.
        start: The refiner whose slices the model started from; they take B's place, so that the model's change is added
            to them: refined + (D - D of the refined slices, encoded).
        refiner: A pixel-space network that corrects the composed slices before they are projected; None for none.
            The commands take the run's own, where `ctpipe train-refiner` found that it wins on held-out pairs.
        change_gain: Of a model's change, D - D of the condition: the share by which it errs least on held-out pairs, 1
            for all of it. A mean that has learnt little is noise about what it starts from, and is taken back so far.
        texture: Of true thin slices: what a single draw is given where it lacks it. None where means are composed.
    """

    detail: Detail = "residual"
    consistency: bool = True
    profile: SliceProfile | None = None
    noise_hu: float | None = None
    base_method: ZMethod = "cubic"
    start: RefinerFile | None = None
    refiner: RefinerFile | None = None
    change_gain: float = 1.0
    texture: Texture | None = None

    def measured(self, thick: Volume, target: Geometry, fit: ProtocolFit | None = None) -> ThickMeasurement:
        """The thick series as seen from ``target``: under the profile and noise asked for, else a pair's fit."""
        profile, noise = (None, None) if fit is None else (fit.profile, fit.noise_hu)
        return ThickMeasurement.of(
            thick, target.z_mm, self.profile or profile, noise if self.noise_hu is None else self.noise_hu
        )


def base_volume(
    thick: Volume, thin_z_mm: NDArray[np.float64], settings: ComposeSettings, window: Window
) -> NDArray[np.float32]:
    """Return B, (z, y, x) float32 HU: what a model's change is added to, interpolated or refined thick slices."""
    if settings.start is None:
        return interpolated_onto(thick, thin_z_mm, settings.base_method)
    from pipeline.refiner import refined_volume

    return refined_volume(settings.start, thick, thin_z_mm, window)


def compose(
    decoded_hu: NDArray[np.float32],
    window: Window,
    measured: ThickMeasurement,
    settings: ComposeSettings | None = None,
    *,
    condition_hu: NDArray[np.float32] | None = None,
    base_hu: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.int16], Mapping[str, Any]]:
    """Final HU at the measurement's thin positions and the figures that go with them.

    Args:
        decoded_hu: (z, y, x) HU from the decoder, meaningful inside ``window`` only.
        window: What the latents hold.
        measured: The thick series with its operator and noise (``ComposeSettings.measured``).
        settings: Defaults to restoring and projecting.
        condition_hu: (z, y, x) HU of the decoded condition, for residual detail.
        base_hu: (z, y, x) ``base_volume``, where the caller has it already; it is not changed.

    Returns:
        (z, y, x) int16 HU, and a JSON-ready mapping: residuals before and after in HU, overall and a thick slice;
        the profile; a warning where another profile explains the thick slices better.
    """
    settings = settings or ComposeSettings()
    if decoded_hu.shape != measured.shape_zyx:
        raise AssertionError(f"decoded {decoded_hu.shape}, measured {measured.shape_zyx}")
    # One pass: a sum is finite only if every term is. A cast to int16 would turn NaN into ordinary HU.
    if not np.isfinite(decoded_hu.sum(dtype=np.float64)):
        raise NonFiniteError(
            "NaN or infinity in the decoded volume",
            expected="finite HU",
            remedy="Run `ctpipe verify STORE`; if it is clean, the checkpoint's weights are damaged.",
        )
    if settings.detail == "absolute":
        condition_hu = None
    x = base_volume(measured.volume, measured.thin_z_mm, settings, window) if base_hu is None else base_hu.copy()
    shares = restore(x, decoded_hu, window, condition_hu, settings.change_gain)
    detail: Detail = "absolute" if condition_hu is None else "residual"
    figures: dict[str, Any] = {"detail": detail, "restored_fraction": round(shares.restored, 6)}
    if condition_hu is not None and settings.change_gain != 1.0:
        figures["change_gain"] = round(settings.change_gain, 4)
    if settings.start is not None:
        figures["start_refiner_sha256"] = settings.start.sha256
    if settings.refiner is not None:
        figures |= _refined(x, settings.refiner, measured, window, detail)
    spoken = shares.spoken > 0 or settings.start is not None or "refiner_sha256" in figures
    hu, agreed = finish(x, measured, settings, window if spoken else None)
    return hu, figures | agreed


def finish(
    x: NDArray[np.float32], measured: ThickMeasurement, settings: ComposeSettings, window: Window | None
) -> tuple[NDArray[np.int16], dict[str, Any]]:
    """Thin slices (z, y, x) in HU, whatever they came from, made consistent where asked for, rounded, and judged.

    ``x`` is overwritten; ``window`` is where a network has answered, None where none has. Returns int16 HU and figures.
    """
    figures = _made_consistent(x, measured, window) if settings.consistency else {}
    np.clip(np.rint(x, out=x), least_hu(measured.volume), 32767, out=x)
    figures["certificate"] = certificate(x, measured).figures()
    return x.astype(np.int16), figures


def least_hu(thick: Volume) -> int:
    """Least HU that an output may hold: air, or the source's own padding below it."""
    return min(-1024, int(thick.hu.min()))


def plain_round_trip(
    decoded_hu: NDArray[np.float32], window: Window, thick: Volume | None, target: Geometry
) -> tuple[NDArray[np.int16], Mapping[str, Any]]:
    """Return what the autoencoder gave, and nothing else inside the window: (z, y, x) int16 HU and figures.

    Only voxels at the window's edges, where a latent says no more than "here or beyond", take interpolated thick HU,
    and only within the thick series' extent. Clipped to the window, the written series is the reconstruction itself.
    """
    x = np.clip(decoded_hu, window.lower, window.upper).astype(np.float32, copy=False)
    if thick is None:
        warning = "no thick series: values beyond the window are clipped, agreement is not checked"
        return np.rint(x).astype(np.int16), {"detail": "round trip", "warning": warning}
    low, high = thick.geometry.extent_mm
    z = np.asarray(target.z_mm)
    measured = ((z >= low - 1e-6) & (z <= high + 1e-6))[:, None, None]
    base = interpolated(thick, target, "cubic")
    below = measured & (x <= window.lower) & (base < window.lower)
    above = measured & (x >= window.upper) & (base > window.upper)
    restored = below | above
    np.copyto(x, base, where=restored)
    np.clip(np.rint(x, out=x), least_hu(thick), 32767, out=x)
    return x.astype(np.int16), {"detail": "round trip", "restored_fraction": round(float(restored.mean()), 6)}


def agreement(hu: NDArray[np.int16], measured: ThickMeasurement, *, residual: bool = True) -> dict[str, Any]:
    """Return how well finished HU (z, y, x) agree with the measured slices, under the names that ``compose`` uses.

    RMS(A x - y), overall and a thick slice (left out without ``residual``), and the certificate.
    """
    judged = {"certificate": certificate(hu, measured).figures()}
    if not residual:
        return judged
    overall, per_slice = residual_rms(hu, measured.hu, measured.operator)
    return judged | {"rms_after_hu": _rounded(overall), "per_slice_after_hu": [_rounded(v) for v in per_slice]}


class Shares(NamedTuple):
    """Shares of all voxels.

    Those restored from thick HU, and those in the window where a network did not just interpolate.
    """

    restored: float
    spoken: float


def restore(
    x: NDArray[np.float32],
    decoded_hu: NDArray[np.float32],
    window: Window,
    condition_hu: NDArray[np.float32] | None,
    change_gain: float = 1.0,
) -> Shares:
    """Write decoded HU into ``x``, which holds B, blended at the window's edges; all (z, y, x) float32."""
    changed = spoken = 0
    for rows in row_blocks(x.shape[1]):
        base = x[:, rows]
        decoded = np.asarray(decoded_hu[:, rows], dtype=np.float32)
        if condition_hu is not None:
            # Only what the window can show takes part: both decodes are clipped before they are compared.
            seen = np.clip(decoded, window.lower, window.upper)
            change = seen - np.clip(condition_hu[:, rows], window.lower, window.upper)
            decoded = np.clip(base, window.lower, window.upper) + np.float32(change_gain) * change
        blended = blend_at_edges(decoded, base, window)
        changed += int(np.count_nonzero(np.abs(blended - decoded) > 0.5))
        inside = (decoded > window.lower) & (decoded < window.upper)
        spoken += int(np.count_nonzero(inside & (np.abs(decoded - base) > SPOKEN_HU)))
        x[:, rows] = blended
    return Shares(changed / x.size, spoken / x.size)


def _refined(
    x: NDArray[np.float32], file: RefinerFile, measured: ThickMeasurement, window: Window, detail: Detail
) -> dict[str, Any]:
    """Refine ``x`` in place, or say why an optional refiner is left out."""
    from pipeline.refiner import misfit, refine

    wrong = misfit(file.load()[1], window, measured.spacing_mm, detail)
    if file.optional and wrong is not None:
        return {"refiner_left_out": f"{wrong[0]}; it was trained for {wrong[1]}"}
    change = refine(file, x, measured, window, detail)
    return {"refiner_sha256": file.sha256, "refiner_change_hu": round(change, 3)}


def _made_consistent(x: NDArray[np.float32], measured: ThickMeasurement, window: Window | None) -> dict[str, Any]:
    """Project ``x`` in place; figures in HU. ``window``: where a network has answered, None where none has."""
    check = check_operator(x, measured.hu, measured.thick_z_mm, measured.thin_z_mm, measured.profile, measured.noise_hu)
    done = enforce_data_consistency(x, measured, window=window, floor_hu=least_hu(measured.volume))
    return {
        "profile": str(measured.profile),
        "noise_hu": round(measured.noise_hu, 3),
        "rms_before_hu": _rounded(done.rms_before),
        "rms_after_hu": _rounded(done.rms_after),
        "change_hu": round(done.change_hu, 3),
        "per_slice_before_hu": [_rounded(v) for v in done.per_slice_before],
        "per_slice_after_hu": [_rounded(v) for v in done.per_slice_after],
        "covered_slices": int(measured.operator.covered.sum()),
        "operator_verdict": check.verdict,
        "operator_best": str(check.best),
        "warning": _doubt(check, done),
    }


def _doubt(check: OperatorCheck, done: ProjectionFigures) -> str:
    """Return what the figures say against the operator, for a reader; empty where nothing does.

    Slices that are smoother than life, as interpolated ones are, favour a narrower profile than the true one, so that
    verdict alone accuses nobody. That the measured slices cannot be met does.
    """
    if check.verdict in ("shifted", "wider"):
        return check.message
    if done.rms_after > UNMET * done.noise_hu:
        return (
            f"no thin slices at or above the HU of air average to the thick ones under {check.assumed}: "
            f"{done.rms_after:.1f} HU are left where {done.noise_hu:.1f} were aimed for; the profile is narrower than "
            "assumed, or the slice positions are wrong"
        )
    return ""


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 3)
