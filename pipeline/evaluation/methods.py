"""Every method's thin volume of one pair, made when asked for: interpolations, VAE reconstructions, networks.

The model's output is composed as ``ctpipe decode --checkpoint`` composes it, with the protocol's slice profile fitted
on other patients. Back-projection and the regression network get the same profile and the same consistency step, so
that what differs between them and the model is the network alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import COMPRESSION, CtpipeError, InputError, LatentGrid, LatentRecord, LatentStore, PairRecord
from pipeline.decode import (
    ComposeSettings,
    DerivedVolume,
    average_samples,
    base_volume,
    compose,
    condition_of,
    textured,
)
from pipeline.forward_model import BASELINES, ThickMeasurement, apply, weights
from pipeline.identity import PrivateStore
from pipeline.metrics import FeaturesOf, intensity as metrics
from pipeline.refiner import RefinerFile
from pipeline.vae import Autoencoder
from pipeline.volume import Geometry, SeriesPointer, Volume, Window, common_slices, grid_difference, onto_field

SPACING_TOLERANCE = 1e-3
"""Relative; DICOM's decimal strings round by less."""


def on_one_grid(thick: Volume, thin: Geometry) -> tuple[Volume, tuple[str, ...]]:
    """The thick series on the thin one's in-plane grid, and a note where it had to be resampled for that.

    Raises:
        InputError: The thin series' field of view reaches beyond what the thick one measured.
    """
    difference = grid_difference(thick.geometry, thin)
    if not difference:
        return thick, ()
    return onto_field(thick, thin), (f"the thick series was resampled in-plane onto the thin one's grid: {difference}",)


def check_record(record: LatentRecord, thin: Geometry) -> None:
    """Refuse a stored latent that covers other slices than the thin series'.

    Raises:
        InputError: Another number of voxels, another spacing, or other positions.
    """
    depth, height, width = record.valid_zyx
    if (depth, height, width) != thin.shape_zyx:
        raise InputError(
            f"a {record.role} latent of {depth}x{height}x{width} voxels",
            expected="the thin series' " + "x".join(map(str, thin.shape_zyx)),
            remedy="Encode the store again: ctpipe encode STORE.",
        )
    grid = LatentGrid.of(thin)
    if not grid.matches(record):
        raise InputError(
            f"a {record.role} latent of slices {record.dz_mm / COMPRESSION:.3f} mm apart from {record.z0_mm:.2f} mm",
            expected=f"the thin series' {grid.dz_mm / COMPRESSION:.3f} mm from {grid.z0_mm:.2f} mm",
            remedy="Encode the store again: ctpipe encode STORE.",
        )


def check_latent_grid(latent: NDArray[Any], thin: Geometry) -> None:
    """Refuse a generated latent (4, d, h, w) that cannot be that of the thin series.

    Raises:
        InputError: Another depth, or less in-plane than the series has.
    """
    depth, height, width = LatentGrid.of(thin).shape_zyx
    if latent.ndim != 4 or latent.shape[1] != depth or latent.shape[2] < height or latent.shape[3] < width:
        raise InputError(
            f"a generated latent of shape {tuple(latent.shape)}",
            expected=f"(4, {depth}, {height} or more, {width} or more)",
            remedy="Sample it again: remove the generated store of this run.",
        )


LatentOf = Callable[[PairRecord], NDArray[Any]]
SamplesOf = Callable[[PairRecord], Iterator[NDArray[Any]]]


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of a comparison.

    Attributes:
        views: Cases that keep their volumes for the report's viewer.
        identity: Changes with anything that changes scores (checkpoint, sampling): cases of another are done again.
        regression: A compact network trained on plain interpolation; None leaves the method out.
        features: Feature maps for the perceptual distance; None leaves the figure out.
    """

    window: Window
    encode_key: str
    compose: ComposeSettings = field(default_factory=ComposeSettings)
    views: int = 3
    identity: str = ""
    regression: RefinerFile | None = None
    features: FeaturesOf | None = None


@dataclass(frozen=True)
class SeriesLocations:
    """Pointers of one pair's series: the part of PRIVATE that scoring needs."""

    pointers: Mapping[str, SeriesPointer]

    def pointer(self, series_key: str) -> SeriesPointer:
        return self.pointers[series_key]


@dataclass(frozen=True)
class CaseWork:
    """Store, VAE, samples and settings that every case needs."""

    store: LatentStore
    private: PrivateStore | SeriesLocations
    vae: Autoencoder
    generated: LatentOf
    settings: EvaluationSettings
    samples: SamplesOf | None = None


@dataclass(frozen=True)
class MethodOutput:
    """One method's volume (z, y, x) in HU on the compared slices, with the figures of its composition.

    ``whole_range`` is False where only values inside the window mean anything; ``hu`` is None where there is an
    ``error`` instead.
    """

    name: str
    hu: NDArray[Any] | None
    whole_range: bool = True
    error: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)


def case_methods(
    work: CaseWork, pair: PairRecord, measured: ThickMeasurement, thin: Geometry
) -> Iterator[MethodOutput]:
    """Every method's volume on the measured part of the thin grid, one at a time.

    A latent of another shape or spacing than the thin series' is that method's error.
    """
    settings, store, thick = work.settings, work.store, measured.volume
    inside = common_slices(thick.geometry, thin)
    target = thin.with_z(np.array(thin.z_mm)[inside])

    decoded = _decoder(work, thin, inside)

    def stored(key: str, role: Any) -> NDArray[np.float32] | None:
        record = store.find(key, role, settings.encode_key)
        if record is None:
            return None
        check_record(record, thin)
        return decoded(store.read(record))

    source, wanted = np.array(thick.geometry.z_mm), np.array(target.z_mm)
    for method in BASELINES:
        yield MethodOutput(method, apply(weights(method, source, wanted, measured.profile), thick.hu))
    start, network = settings.compose.start, settings.regression
    plain = replace(settings.compose, start=None)
    yield _tried("cubic_consistent", lambda: _composed("cubic_consistent", settings, measured, plain, None))
    if network is not None:
        yield _tried("regression", lambda: _composed("regression", settings, measured, plain, network))
    if start is not None:
        yield _tried("refined", lambda: _composed("refined", settings, measured, settings.compose, None))
    condition_hu: NDArray[np.float32] | None = None
    try:
        row = condition_of(store, pair, settings.encode_key, start)
        condition_hu = None if row is None else stored(row.key, row.role)
    except CtpipeError as error:
        yield MethodOutput("condition_round_trip", None, error=str(error))
    if condition_hu is not None:
        yield MethodOutput("condition_round_trip", condition_hu, whole_range=False)
    yield _tried("model", lambda: _model(work, pair, measured, condition_hu, decoded))
    condition_hu = None
    ceiling = _tried("vae_ceiling", lambda: MethodOutput("vae_ceiling", stored(pair.thin_key, "thin"), False))
    if ceiling.hu is not None or ceiling.error:
        yield ceiling


def _decoder(work: CaseWork, thin: Geometry, inside: slice) -> Callable[[NDArray[Any]], NDArray[np.float32]]:
    """Return the function from a latent on the thin grid to HU on the compared slices; it refuses another grid."""

    def decoded(latent: NDArray[Any]) -> NDArray[np.float32]:
        check_latent_grid(latent, thin)
        unit = np.asarray(work.vae.decode(np.asarray(latent, dtype=np.float32), thin.shape_zyx))
        return work.settings.window.from_unit(unit[inside])

    return decoded


def _tried(name: str, make: Callable[[], MethodOutput]) -> MethodOutput:
    """The output, or why there is none."""
    try:
        return make()
    except CtpipeError as error:
        return MethodOutput(name, None, error=str(error))


def _composed(
    name: str,
    settings: EvaluationSettings,
    measured: ThickMeasurement,
    composing: ComposeSettings,
    network: RefinerFile | None,
) -> MethodOutput:
    """Interpolated or refined thick HU, perhaps through a network, made consistent as the model's output is.

    Without a network it is what the consistency step alone is worth: a model's own gain begins there.
    """
    how = replace(composing, detail="absolute", refiner=network)
    base = base_volume(measured.volume, measured.thin_z_mm, how, settings.window)
    hu, figures = compose(base, settings.window, measured, how, base_hu=base)
    return MethodOutput(name, hu, figures=figures)


def _model(
    work: CaseWork,
    pair: PairRecord,
    measured: ThickMeasurement,
    condition_hu: NDArray[np.float32] | None,
    decoded: Callable[[NDArray[Any]], NDArray[np.float32]],
) -> MethodOutput:
    composing = work.settings.compose
    if composing.detail == "residual" and condition_hu is None:
        raise InputError(
            f"pair {pair.pair_key} without a usable latent of the model's condition",
            expected="one, because residual detail needs the condition decoded",
            remedy="Encode with --roles thin,thick,thick_on_thin (with --refiner for a model that starts from refined "
            "slices), or use --detail absolute.",
        )
    generated = metrics.require_finite(decoded(work.generated(pair)), "the decoded model output")
    seen = condition_hu if composing.detail == "residual" else None
    hu, figures = compose(generated, work.settings.window, measured, composing, condition_hu=seen)
    hu, figures = textured(hu, figures, measured, composing)
    return MethodOutput("model", hu, figures=figures)


def composed_samples(
    work: CaseWork, pair: PairRecord, measured: ThickMeasurement, thin: Geometry, latents: Iterable[NDArray[Any]]
) -> DerivedVolume:
    """Samples composed with the measured slices as a decode writes them: mean, spread, the first, and its alarm.

    The alarm, where the first differs from the others, takes three samples; of fewer there is none.
    """
    settings = work.settings
    decoded = _decoder(work, thin, common_slices(measured.volume.geometry, thin))
    condition = None
    if settings.compose.detail == "residual":
        row = condition_of(work.store, pair, settings.encode_key, settings.compose.start)
        condition = None if row is None else decoded(work.store.read(row))
    kept = list(latents)
    return average_samples(
        (decoded(latent) for latent in kept), settings.window, measured, thin, settings.compose, condition,
        alarm=len(kept) >= 3,
    )  # fmt: skip
