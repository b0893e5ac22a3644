"""Evaluate a store's held-out pairs one by one, with bounded memory; a case that is done is not done again.

Methods of a case are made, scored and dropped one after the other: beside the truth and the thick series, at most two
thin volumes are in memory, and what the VAE needs to decode one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache.errors import CtpipeError, InputError
from latentcache.records import PairRecord
from latentcache.store import LatentStore
from pipeline import metrics
from pipeline.baselines import BASELINES, apply, weights
from pipeline.compose import ComposeSettings, compose
from pipeline.encode import Encoder
from pipeline.evaluate import Case, CaseScores, common_slices, failed, notes_on, score_method
from pipeline.evaluate_files import finished_case, keep_case
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.private import PrivateStore
from pipeline.protocol_fit import ProtocolFit, Protocols
from pipeline.report_views import CaseView, view_stride
from pipeline.slice_profile import SliceProfile, default_profile, slice_operator
from pipeline.volume import Volume
from pipeline.volume_reader import read_series

log = logging.getLogger("ctpipe.evaluate")

VIEWED = ("truth", "nearest", "linear", "cubic", "model", "vae_ceiling", "uncertainty")
SCORES_VERSION = "2"
"""Part of a case's identity: raise it when a figure's definition changes, so that old cases are done again."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What is compared. ``views`` cases keep their volumes for the report's viewer."""

    window: Window
    encode_key: str
    compose: ComposeSettings = field(default_factory=ComposeSettings)
    views: int = 3
    identity: str = ""
    """Changes with anything that changes scores (checkpoint, sampling): cases of another identity are done again."""


LatentOf = Callable[[PairRecord], NDArray[Any]]
SamplesOf = Callable[[PairRecord], Iterator[NDArray[Any]]]


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


def evaluate_pairs(
    store: LatentStore,
    private: PrivateStore,
    vae: Encoder,
    pairs: Sequence[PairRecord],
    generated: LatentOf,
    settings: EvaluationSettings,
    folder: Path,
    samples: SamplesOf | None = None,
) -> Iterator[CaseScores]:
    """Score every method on each pair and yield cases in order; ``generated`` gives the model's raw latents of a pair.

    Args:
        samples: Single samples of a pair, whose spread the viewer shows; None shows none.

    Raises:
        InputError: There is no pair to evaluate. A single pair's failure is recorded in its case instead.
    """
    if not pairs:
        raise InputError(
            "no pair to evaluate",
            expected="at least one encoded thick/thin pair in the split",
            remedy="Choose another --split, or encode the store first.",
        )
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    protocols = Protocols(store.pairs(), {s.series_key: s for s in store.series()}, private.pointer, read_series)
    work = _Work(store, private, vae, generated, settings, samples)
    for number, pair in enumerate(pairs):
        path = folder / "cases" / f"{pair.pair_key}.json"
        done = finished_case(path, settings.identity)
        if done is not None:
            yield done
            continue
        try:
            case = _evaluate(work, pair, protocols.fit(pair), folder if number < settings.views else None)
        except CtpipeError as error:
            log.warning("pair %s could not be evaluated: %s", pair.pair_key, error)
            case = failed(pair.pair_key, pair.category, pair.patient_key, str(error))
        keep_case(path, settings.identity, case)
        yield case


@dataclass(frozen=True)
class _Work:
    """What every case needs."""

    store: LatentStore
    private: PrivateStore
    vae: Encoder
    generated: LatentOf
    settings: EvaluationSettings
    samples: SamplesOf | None = None


def case_methods(
    work: _Work, pair: PairRecord, thick: Volume, thin: Geometry, fit: ProtocolFit | None = None
) -> Iterator[MethodOutput]:
    """Every method's volume on the measured part of the thin grid, made when asked for.

    The model's output is composed as ``ctpipe decode --checkpoint`` composes it, with the protocol's slice profile
    fitted on other patients; back-projection uses the same profile.
    """
    settings, store = work.settings, work.store
    window = settings.window
    inside = common_slices(thick.geometry, thin)
    target = thin.with_z(np.array(thin.z_mm)[inside])

    def decoded(latent: NDArray[Any]) -> NDArray[np.float32]:
        unit = np.asarray(work.vae.decode(np.asarray(latent, dtype=np.float32), thin.shape_zyx))
        return window.from_unit(unit[inside])

    source, wanted = np.array(thick.geometry.z_mm), np.array(target.z_mm)
    profile = settings.compose.profile or (fit.profile if fit else _stated_profile(thick))
    for method in BASELINES:
        yield MethodOutput(method, apply(weights(method, source, wanted, profile), thick.hu))
    condition = store.find(pair.pair_key, "thick_on_thin", settings.encode_key)
    condition_hu = None
    if condition is not None:
        condition_hu = decoded(store.read(condition))
        yield MethodOutput("condition_round_trip", condition_hu, whole_range=False)
    try:
        yield _model_output(work, pair, thick, target, fit, condition_hu, decoded)
    except CtpipeError as error:
        yield MethodOutput("model", None, error=str(error))
    del condition_hu
    ceiling = store.find(pair.thin_key, "thin", settings.encode_key)
    if ceiling is not None:
        yield MethodOutput("vae_ceiling", decoded(store.read(ceiling)), whole_range=False)


def _model_output(
    work: _Work,
    pair: PairRecord,
    thick: Volume,
    target: Geometry,
    fit: ProtocolFit | None,
    condition_hu: NDArray[np.float32] | None,
    decoded: Callable[[NDArray[Any]], NDArray[np.float32]],
) -> MethodOutput:
    composing = work.settings.compose
    if composing.detail == "residual" and condition_hu is None:
        raise InputError(
            f"pair {pair.pair_key} without a thick_on_thin latent",
            expected="one, because residual detail needs the condition decoded",
            remedy="Encode with --roles thin,thick,thick_on_thin, or use --detail absolute.",
        )
    if fit is not None:
        composing = replace(
            composing, profile=composing.profile or fit.profile, noise_hu=composing.noise_hu or fit.noise_hu
        )
    generated = metrics.require_finite(decoded(work.generated(pair)), "the decoded model output")
    seen = condition_hu if composing.detail == "residual" else None
    hu, figures = compose(generated, work.settings.window, thick, target, composing, condition_hu=seen)
    return MethodOutput("model", hu, figures=figures)


def _evaluate(work: _Work, pair: PairRecord, fit: ProtocolFit | None, view_folder: Path | None) -> CaseScores:
    thick, thin = (read_series(work.private.pointer(key)) for key in (pair.thick_key, pair.thin_key))
    inside = common_slices(thick.geometry, thin.geometry)
    geometry = thin.geometry.with_z(np.array(thin.geometry.z_mm)[inside])
    profile = fit.profile if fit else _stated_profile(thick)
    operator = slice_operator(profile, np.array(thick.geometry.z_mm), np.array(geometry.z_mm))
    case = Case(thin.hu[inside], geometry, thick.geometry.z_mm, operator)
    scores: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    misfit: Mapping[str, Any] = {}
    stride = view_stride(case.truth.shape)
    view = {"truth": _for_viewer(case.truth, stride)}
    for output in case_methods(work, pair, thick, thin.geometry, fit):
        if output.hu is None:
            failures[output.name] = output.error
            continue
        if view_folder is not None and output.name in VIEWED:
            view[output.name] = _for_viewer(output.hu, stride)
        if output.figures:
            misfit = {"rms_hu": output.figures.get("rms_after_hu"), **output.figures}
        try:
            scores[output.name] = score_method(output.hu, case, work.settings.window, whole_range=output.whole_range)
        except InputError as error:
            failures[output.name] = str(error)
    if view_folder is not None:
        if work.samples is not None:
            spread = _spread(work, work.samples(pair), thin.geometry.shape_zyx)
            view["uncertainty"] = _for_viewer(spread[inside], stride)
        dz, dy, dx = geometry.spacing_mm_zyx
        _save_view(view_folder, pair.pair_key, (dz, dy * stride, dx * stride), view)
    return CaseScores(
        pair.pair_key, pair.category, len(case.truth), scores, failures, dict(misfit),
        pair.patient_key, notes_on(case.truth),
    )  # fmt: skip


def _stated_profile(thick: Volume) -> SliceProfile:
    return default_profile(thick.geometry.thickness_mm, thick.geometry.spacing_mm_zyx[0])


def _spread(work: _Work, latents: Iterator[NDArray[Any]], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Standard deviation in HU of decoded samples (Welford's update, one sample in memory at a time)."""
    count, window = 0, work.settings.window
    mean = np.zeros(shape, dtype=np.float32)
    squares = np.zeros(shape, dtype=np.float32)
    for latent in latents:
        hu = window.from_unit(np.asarray(work.vae.decode(np.asarray(latent, dtype=np.float32), shape)))
        count += 1
        step = hu - mean
        mean += step / np.float32(count)
        squares += step * (hu - mean)
    return np.asarray(np.sqrt(squares / np.float32(max(count - 1, 1))))


def _for_viewer(hu: NDArray[Any], stride: int) -> NDArray[np.int16]:
    return np.asarray(np.clip(np.rint(hu[:, ::stride, ::stride]), -1024, 3071).astype(np.int16))


def _save_view(
    folder: Path, key: str, spacing: tuple[float, float, float], volumes: Mapping[str, NDArray[np.int16]]
) -> None:
    (folder / "views").mkdir(exist_ok=True)
    draft = folder / "views" / f".{key}.part.npz"
    arrays: dict[str, Any] = {"spacing_mm_zyx": np.array(spacing), **volumes}
    np.savez_compressed(draft, **arrays)
    draft.replace(folder / "views" / f"{key}.npz")


def load_views(folder: Path, keys: Sequence[str] | None = None) -> list[CaseView]:
    """The volumes that an evaluation kept for its report; ``keys`` leaves out those of an earlier evaluation."""
    views = []
    for path in sorted((folder / "views").glob("[!.]*.npz")):
        if keys is not None and path.stem not in keys:
            continue
        with np.load(path) as data:
            dz, dy, dx = (float(v) for v in data["spacing_mm_zyx"])
            volumes = {name: data[name] for name in VIEWED if name in data}
        views.append(CaseView(path.stem, (dz, dy, dx), volumes))
    return views
