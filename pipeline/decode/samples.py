"""From decoded samples to the written series: compose each with the measurement, average, and write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.decode.compose import (
    ComposeSettings,
    agreement,
    base_volume,
    compose,
    least_hu,
    plain_round_trip,
)
from pipeline.decode.texture import with_texture
from pipeline.forward_model import ThickMeasurement
from pipeline.metrics import OtherSamples, alarm_map
from pipeline.volume import Geometry, NiftiLayout, SourceHeader, Window
from pipeline.writing import (
    FileOptions,
    Provenance,
    SeriesIdentity,
    WrittenSeries,
    check_enhanced,
    kinds_of_file,
    write_ct_series,
    write_enhanced_ct,
    write_nifti,
    write_parametric_map,
)

Answer = Literal["mean", "sample", "both"]
ANSWERS: tuple[Answer, ...] = get_args(Answer)
UNCERTAINTY_SLOPE = 0.1
"""HU per stored unit of an uncertainty series."""


def parse_answer(text: str, samples: int) -> Answer:
    """``mean``, ``sample`` or ``both``, from the command line, of so many samples."""
    for known in ANSWERS:
        if text == known and known != "mean" and samples < 2:
            raise InputError(f"answer {text} of one sample", expected="several", remedy="Give --samples 4, or more.")
        if text == known:
            return known
    raise InputError(f"answer {text!r}", expected="mean, sample or both", remedy="Give --answer mean.")


@dataclass(frozen=True)
class DerivedVolume:
    """A finished volume: (z, y, x) int16 HU.

    ``spread`` is the standard deviation over samples in HU, if there were several; ``figures`` is JSON-ready.
    ``sample`` is the first of several, with its figures; ``hu`` is then their mean. ``alarm`` says where the
    first sample differs from the others, if that was asked for.
    """

    hu: NDArray[np.int16]
    spread: NDArray[np.float32] | None
    n_samples: int
    figures: Mapping[str, Any]
    sample: NDArray[np.int16] | None = None
    sample_figures: Mapping[str, Any] = field(default_factory=dict)
    alarm: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class WriteSettings:
    """Settings for writing derived series. ``sampling`` and ``checkpoint_sha256`` go into the provenance.

    Attributes:
        uncertainty_map: The uncertainty as a Parametric Map instead of a second CT series.
        enhanced: One Enhanced CT instance instead of a CT instance a slice.
        answer: Of several samples the ``mean``, for viewing; one ``sample``, for measuring density and texture, which
            a mean smooths away; or ``both``, the sample in a separate folder.
        layout: Write NIfTI, laid out so, instead of DICOM, all volumes in one folder.
        alarm_map: Where the written sample differs from the others, as a Parametric Map beside it.
    """

    out_dir: Path
    window: Window
    transfer_syntax: str = "explicit"
    uncertainty: bool = False
    uncertainty_map: bool = False
    enhanced: bool = False
    checkpoint_sha256: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    store_snapshot: int | None = None
    answer: Answer = "mean"
    layout: NiftiLayout | None = None
    alarm_map: bool = False

    def __post_init__(self) -> None:
        if self.alarm_map and self.answer == "mean":
            raise InputError(
                "an alarm map beside a mean",
                expected="the sample that the map judges",
                remedy="Give --answer sample or both with --alarm-map.",
            )

    @property
    def samples_apart(self) -> bool:
        """Whether every sample is wanted as a volume, not only their mean."""
        return self.uncertainty or self.alarm_map or self.answer != "mean"


@dataclass(frozen=True)
class DerivedSeries:
    """A derived series as written; keys and figures only. ``folders`` are names below the output folder."""

    key: str
    series_uid: str
    folders: tuple[str, ...]
    n_slices: int
    figures: Mapping[str, Any]


def textured(
    hu: NDArray[np.int16], figures: Mapping[str, Any], measured: ThickMeasurement | None, settings: ComposeSettings
) -> tuple[NDArray[np.int16], Mapping[str, Any]]:
    """A draw with the texture that the settings ask for, and its figures with what that changes."""
    if measured is None or settings.texture is None:
        return hu, figures
    hu, added = with_texture(hu, measured, settings.texture, least_hu(measured.volume))
    return hu, {**figures, **added, **agreement(hu, measured, residual=settings.consistency)}


def average_samples(
    decoded: Iterable[NDArray[np.float32]],
    window: Window,
    measured: ThickMeasurement | None,
    target: Geometry,
    settings: ComposeSettings,
    condition_hu: NDArray[np.float32] | None = None,
    base_hu: NDArray[np.float32] | None = None,
    *,
    alarm: bool = False,
) -> DerivedVolume:
    """Compose every decoded sample (z, y, x) float32 HU with the measurement, and average what comes out.

    The mean errs least (it is the posterior mean in the limit); the spread is that of the composed samples, so that
    what the measurement fixes shows no uncertainty. With ``alarm`` the first sample is held against the others. A draw
    that is handed on by itself, the only one or the first of several, gets the texture that the settings ask for;
    mean, spread and alarm are of the draws as they came.

    Raises:
        InputError: An alarm of fewer than three samples, or without a thick series.
    """
    first = mean = squares = None
    base = base_hu
    if base is None and measured is not None and settings.start is not None:
        # A network's pass: once for all samples.
        base = base_volume(measured.volume, measured.thin_z_mm, settings, window)
    figures: Mapping[str, Any] = {}
    first_figures: Mapping[str, Any] = {}
    number = 0
    for number, one in enumerate(decoded, start=1):
        hu, figures = _composed(one, window, measured, target, settings, condition_hu, base)
        del one  # not kept while the next sample is decoded
        if first is None:
            first, first_figures = hu, figures
            continue
        if mean is None or squares is None:
            mean, squares = first.astype(np.float32), np.zeros(hu.shape, np.float32)
        # Welford's update: one pass, no large sums that cancel.
        delta = hu - mean
        mean += delta / number
        squares += delta * (hu - mean)
    assert first is not None
    if alarm and (measured is None or number < 3):
        raise InputError(
            f"an alarm map of {number} samples" + ("" if measured is not None else " without a thick series"),
            expected="three samples or more and what was measured",
            remedy="Give --samples 8, or leave --alarm-map away.",
        )
    if mean is None or squares is None:
        first, figures = textured(first, figures, measured, settings)
        return DerivedVolume(first, None, 1, figures)
    out = np.rint(mean).astype(np.int16)
    if measured is not None:
        figures = {**figures, **agreement(out, measured, residual=settings.consistency)}
    spread = np.sqrt(squares / (number - 1))
    figures = {**figures, "uncertainty_mean_hu": round(float(spread.mean()), 3)}
    found = None
    if alarm and measured is not None:
        found = alarm_map(first, _all_but(first, mean, squares, number), measured)
    first, first_figures = textured(first, first_figures, measured, settings)
    return DerivedVolume(out, spread, number, figures, first, first_figures, found)


def _all_but(
    first: NDArray[np.int16], mean: NDArray[np.float32], squares: NDArray[np.float32], number: int
) -> OtherSamples:
    """Mean and spread of all samples but the first, from those of all: Welford's update backwards."""
    delta = first - mean
    rest = squares - np.square(delta) * np.float32(number / (number - 1))
    spread = np.sqrt(np.maximum(rest, 0) / np.float32(number - 2))
    return OtherSamples(mean - delta / np.float32(number - 1), spread, number - 1)


def _composed(
    decoded: NDArray[np.float32],
    window: Window,
    measured: ThickMeasurement | None,
    target: Geometry,
    settings: ComposeSettings,
    condition_hu: NDArray[np.float32] | None,
    base: NDArray[np.float32] | None,
) -> tuple[NDArray[np.int16], Mapping[str, Any]]:
    if measured is not None:
        return compose(decoded, window, measured, settings, condition_hu=condition_hu, base_hu=base)
    return plain_round_trip(decoded, window, None, target)


def write_derived(
    key: str,
    volume: DerivedVolume,
    target: Geometry,
    header: SourceHeader,
    identity: SeriesIdentity,
    provenance: Provenance,
    settings: WriteSettings,
) -> DerivedSeries:
    """Write ``out_dir/key`` and, where asked for and there are several samples, before it ``out_dir/key-uncertainty``.

    ``out_dir/key-sample`` likewise. So a series that is there is there with what belongs to it; one whose series never
    came, because its writer was killed between the two, is written anew. The figures, the sampling settings, the
    certificate and every warning go into the provenance.

    Raises:
        InputError: A folder exists, or the source lacks what Enhanced CT requires.
    """
    sampling = dict(settings.sampling)
    if volume.n_samples > 1:
        sampling["samples"] = volume.n_samples
    provenance = replace(
        provenance,
        checkpoint_sha256=settings.checkpoint_sha256,
        refiner_sha256=str(volume.figures.get("refiner_sha256", "")),
        store_snapshot=settings.store_snapshot,
        sampling=sampling,
    )
    mean = _with_figures(provenance, volume.figures, "mean" if volume.n_samples > 1 else "")
    sample = _with_figures(provenance, volume.sample_figures, "sample")
    if settings.layout is not None:
        return _write_nifti(key, volume, target, (mean, sample), settings, settings.layout)
    folders = [key]
    if settings.enhanced:
        check_enhanced(header)
    if settings.uncertainty and volume.spread is not None:
        name = f"{key}-uncertainty"
        _clear_orphan(settings.out_dir / name, "uncertainty")
        described = replace(mean, kind="uncertainty", answer="")
        _write_uncertainty(volume.spread, target, header, settings.out_dir / name, identity, described, settings)
        folders.append(name)
    if settings.alarm_map and volume.alarm is not None:
        name = f"{key}-alarm"
        _clear_orphan(settings.out_dir / name, "alarm")
        described = replace(sample, kind="alarm", answer="")
        folder = settings.out_dir / name
        write_parametric_map(volume.alarm, target, header, folder, uids=identity, provenance=described)
        folders.append(name)
    write = _writer(settings)
    if volume.sample is not None and settings.answer == "both":
        name = f"{key}-sample"
        _clear_orphan(settings.out_dir / name, "sample")
        write(volume.sample, target, header, settings.out_dir / name, uids=identity, provenance=sample)
        folders.append(name)
    hu, figures, own = volume.hu, volume.figures, mean
    if volume.sample is not None and settings.answer == "both" and "certificate" in volume.sample_figures:
        figures = {**figures, "sample_certificate": volume.sample_figures["certificate"]}
    if volume.sample is not None and settings.answer == "sample":
        hu, figures, own = volume.sample, volume.sample_figures, sample
    written = write(hu, target, header, settings.out_dir / key, uids=identity, provenance=own)
    return DerivedSeries(key, written.series_uid, tuple(folders), len(hu), figures)


def _writer(settings: WriteSettings) -> Callable[..., WrittenSeries]:
    """Return the function that writes a volume in the form that the settings ask for."""
    if settings.enhanced:
        return partial(write_enhanced_ct, transfer_syntax=settings.transfer_syntax)
    return partial(write_ct_series, files=FileOptions(settings.transfer_syntax))


def _write_nifti(
    key: str,
    volume: DerivedVolume,
    target: Geometry,
    provenance: tuple[Provenance, Provenance],
    settings: WriteSettings,
    layout: NiftiLayout,
) -> DerivedSeries:
    """As `write_derived`, all volumes in one folder; ``provenance`` of the mean and of the sample."""
    mean, sample = provenance
    hu, figures, own = volume.hu, volume.figures, mean
    volumes: dict[str, NDArray[Any]] = {}
    if volume.sample is not None and settings.answer == "sample":
        hu, figures, own = volume.sample, volume.sample_figures, sample
    elif volume.sample is not None and settings.answer == "both":
        volumes["sample"] = volume.sample
    if settings.uncertainty and volume.spread is not None:
        volumes["uncertainty"] = np.asarray(volume.spread, np.float32)
    write_nifti({"thin": hu, **volumes}, target, layout, settings.out_dir / key, own)
    return DerivedSeries(key, "", (key,), len(hu), figures)


def _with_figures(
    provenance: Provenance, figures: Mapping[str, Any], answer: Literal["", "mean", "sample"]
) -> Provenance:
    """The provenance of one of the answers, with its figures and warnings."""
    warnings = (str(figures["warning"]),) if figures.get("warning") else ()
    return replace(provenance, consistency=figures, answer=answer, notes=(*provenance.notes, *warnings))


def _clear_orphan(folder: Path, what: Literal["uncertainty", "sample", "alarm"]) -> None:
    """Remove such a series of ours; the series that it belongs to is known to be absent."""
    names = sorted(folder.glob("*.dcm")) if folder.is_dir() else []
    if not names or len(names) != len(list(folder.iterdir())):
        return
    # What is not ours stays: whoever writes next refuses to overwrite it.
    if what in kinds_of_file(names[0]):
        shutil.rmtree(folder)


def _write_uncertainty(
    spread: NDArray[np.float32],
    target: Geometry,
    header: SourceHeader,
    out_dir: Path,
    identity: SeriesIdentity,
    provenance: Provenance,
    settings: WriteSettings,
) -> None:
    """Standard deviation (z, y, x) in HU: floats in a Parametric Map, or a CT series in steps of a tenth of a HU."""
    if settings.uncertainty_map:
        write_parametric_map(spread, target, header, out_dir, uids=identity, provenance=provenance)
        return
    stored = np.clip(np.rint(spread / UNCERTAINTY_SLOPE), 0, 32767).astype(np.int16)
    write_ct_series(
        stored,
        target,
        header,
        out_dir,
        uids=identity,
        provenance=provenance,
        files=FileOptions(transfer_syntax=settings.transfer_syntax, slope=UNCERTAINTY_SLOPE),
    )
