"""Evaluate a store's held-out pairs one by one, with bounded memory; a case that is done is not done again.

Methods of a case are made, scored and dropped one after the other: beside the truth and the thick series, at most two
thin volumes are in memory, and what the VAE needs to decode one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import CtpipeError, InputError, PairRecord
from latentcache.storage import written_aside
from pipeline.decode import DerivedVolume
from pipeline.engines import EngineOptions, Outcome, Stage, check_seen, mark, note, pin, stream
from pipeline.evaluation.case import Case, CaseScores, failed, notes_on, score_method
from pipeline.evaluation.methods import (
    CaseWork,
    SeriesLocations,
    case_methods,
    composed_samples,
    on_one_grid,
)
from pipeline.evaluation.phantom_truth import known_structures
from pipeline.evaluation.results import finished_case, keep_case
from pipeline.evaluation.views import ALARM_STEP, CaseView, towards, view_stride
from pipeline.forward_model import ProtocolFit, Protocols
from pipeline.identity import PrivateStore
from pipeline.reading import read_series
from pipeline.vae import Autoencoder
from pipeline.volume import SourceHeader, common_slices

log = logging.getLogger("ctpipe.evaluate")


@dataclass(frozen=True)
class CaseTask:
    """One pair to score. ``problem`` is why the driver could not say where it is."""

    pair: PairRecord
    places: SeriesLocations = field(default_factory=lambda: SeriesLocations({}))
    fit: ProtocolFit | None = None
    view_folder: Path | None = None
    problem: CtpipeError | None = None

    @property
    def key(self) -> str:
        return self.pair.pair_key


Score = Callable[[CaseWork, PairRecord, ProtocolFit | None, Path | None], CaseScores]


def as_it_is(task: CaseTask) -> CaseTask:
    """The stage's CPU part. Pixels are read where they are scored, so that two thin volumes at most are in memory."""
    return task


def get_ready(
    device: str, *, work: CaseWork, load: Callable[[str], Autoencoder] | None, seen: Path, threads: int | None
) -> CaseWork:
    """A worker's state: the work with a separate VAE, where the driver's cannot be shared."""
    check_seen(seen)
    if threads is not None:
        pin(threads)
    return work if load is None else replace(work, vae=load(device))


def run_case(work: CaseWork, task: CaseTask, *, score: Score, threads: int | None) -> CaseScores:
    """The stage's device part. A pair that cannot be compared is a case that says so; anything else is the engine's."""
    if threads is not None:
        pin(threads)
    pair = task.pair
    try:
        if task.problem is not None:
            raise task.problem
        return score(replace(work, private=task.places), pair, task.fit, task.view_folder)
    except CtpipeError as error:
        note(log, "set_aside", logging.WARNING, f"pair {pair.pair_key} could not be evaluated: {error}",
             series_key=pair.pair_key, stage="evaluate", outcome=type(error).__name__)  # fmt: skip
        return failed(pair.pair_key, pair.category, pair.patient_key, str(error))


@dataclass(frozen=True)
class ScoreSpread:
    """Distribution of cases over workers.

    Attributes:
        options: The engine; one after the other in this process by default.
        load: Makes a worker's own VAE on its device; None where this process's serves.
        threads: Arithmetic threads per worker, pinned for equal figures; None leaves them as they are.
    """

    options: EngineOptions = field(default_factory=lambda: EngineOptions("inline"))
    load: Callable[[str], Autoencoder] | None = None
    threads: int | None = None


def spread_cases(
    tasks: Sequence[CaseTask],
    work: CaseWork,
    score: Score,
    spread: ScoreSpread,
    folder: Path,
) -> Generator[Outcome[CaseTask, CaseScores], None, None]:
    """Score tasks on an engine; outcomes as they come.

    Raises:
        InputError: No worker can start, or one sees another folder.
    """
    if not tasks:
        return
    with mark(folder.absolute()) as seen:
        stage: Stage[CaseTask, CaseTask, CaseWork, CaseScores] = Stage(
            prepare=as_it_is,
            setup=functools.partial(get_ready, work=work, load=spread.load, seen=seen, threads=spread.threads),
            run=functools.partial(run_case, score=score, threads=spread.threads),
        )
        with contextlib.closing(stream(tasks, stage, spread.options)) as outcomes:
            yield from outcomes


VIEWED = ("truth", "nearest", "linear", "cubic", "regression", "model", "vae_ceiling", "sample", "uncertainty", "alarm")
SCORES_VERSION = "5"
"""Part of a case's identity: raise it when a figure's definition changes, so that old cases are done again."""


def evaluate_pairs(
    work: CaseWork, pairs: Sequence[PairRecord], folder: Path, spread: ScoreSpread | None = None
) -> Generator[CaseScores, None, None]:
    """Score every method on each pair and yield cases in order.

    Raises:
        InputError: There is no pair to evaluate. A single pair's failure is recorded in its case instead.
    """
    spread, settings = spread or ScoreSpread(), work.settings
    if not pairs:
        raise InputError(
            "no pair to evaluate",
            expected="at least one encoded thick/thin pair in the split",
            remedy="Choose another --split, or encode the store first.",
        )
    (folder / "cases").mkdir(parents=True, exist_ok=True)
    series = {s.series_key: s for s in work.store.series()}
    protocols = Protocols(work.store.pairs(), series, work.private.pointer, read_series)
    paths = {pair.pair_key: folder / "cases" / f"{pair.pair_key}.json" for pair in pairs}
    done = {key: case for key, path in paths.items() if (case := finished_case(path, settings.identity)) is not None}
    viewed = {pair.pair_key for pair in pairs[: settings.views]}
    todo = [
        _task(pair, work.private, protocols, folder.absolute() if pair.pair_key in viewed else None)
        for pair in pairs
        if pair.pair_key not in done
    ]
    order = deque(pair.pair_key for pair in pairs)
    scored = spread_cases(todo, work, _evaluate, spread, folder)
    with contextlib.closing(scored) as outcomes:
        while order:
            while order and order[0] in done:
                yield done.pop(order.popleft())
            if order:
                outcome = next(outcomes)
                case = done[outcome.item.key] = outcome.value or _lost(outcome)
                if outcome.ok:
                    keep_case(paths[outcome.item.key], settings.identity, case)


def _task(
    pair: PairRecord, private: PrivateStore | SeriesLocations, protocols: Protocols, view_folder: Path | None
) -> CaseTask:
    try:
        places = SeriesLocations({key: private.pointer(key) for key in (pair.thick_key, pair.thin_key)})
        return CaseTask(pair, places, protocols.fit(pair), view_folder)
    except CtpipeError as error:
        return CaseTask(pair, problem=error)


def _lost(outcome: Outcome[CaseTask, CaseScores]) -> CaseScores:
    """The case of a pair whose worker died, hung or met a bug: not kept, so that the next run tries it again."""
    pair, reason = outcome.item.pair, outcome.error or "unknown"
    said = f"pair {pair.pair_key} could not be evaluated: {reason}"
    kind = outcome.error_kind or "unknown"
    note(log, "set_aside", logging.WARNING, said, series_key=pair.pair_key, stage="evaluate", outcome=kind)
    return failed(pair.pair_key, pair.category, pair.patient_key, reason)


def _evaluate(work: CaseWork, pair: PairRecord, fit: ProtocolFit | None, view_folder: Path | None) -> CaseScores:
    pointers = [work.private.pointer(key) for key in (pair.thick_key, pair.thin_key)]
    thick, thin = (read_series(pointer) for pointer in pointers)
    scanner = scanner_of(thick.header)
    thick, remarks = on_one_grid(thick, thin.geometry)
    inside = common_slices(thick.geometry, thin.geometry)
    geometry = thin.geometry.with_z(np.array(thin.geometry.z_mm)[inside])
    measured = work.settings.compose.measured(thick, geometry, fit)
    case = Case(
        thin.hu[inside], geometry, thick.geometry.z_mm, measured.operator, thick.hu,
        known_structures(pointers[1], geometry), work.settings.features,
    )  # fmt: skip
    scores: dict[str, dict[str, Any]] = {}
    failures: dict[str, str] = {}
    misfit: Mapping[str, Any] = {}
    stride = view_stride(case.truth.shape)
    view = {"truth": _for_viewer(case.truth, stride)}
    for output in case_methods(work, pair, measured, thin.geometry):
        if output.hu is None:
            failures[output.name] = output.error
            continue
        if view_folder is not None and output.name in VIEWED:
            view[output.name] = _for_viewer(output.hu, stride)
        if output.name == "model":
            misfit = {"scanner": scanner, "rms_hu": output.figures.get("rms_after_hu"), **output.figures}
        try:
            scores[output.name] = score_method(output.hu, case, work.settings.window, whole_range=output.whole_range)
        except InputError as error:
            failures[output.name] = str(error)
        del output  # else it would stay in memory while the next method's volume is made
    if view_folder is not None:
        if work.samples is not None and "model" in scores:
            several = composed_samples(work, pair, measured, thin.geometry, work.samples(pair))
            view |= _views_of(several, stride)
        dz, dy, dx = geometry.spacing_mm_zyx
        _save_view(view_folder, CaseView(pair.pair_key, (dz, dy * stride, dx * stride), view, towards(geometry)))
    return CaseScores(
        pair.pair_key, pair.category, len(case.truth), scores, failures, dict(misfit),
        pair.patient_key, (*remarks, *notes_on(case.truth)),
    )  # fmt: skip


def scanner_of(header: SourceHeader) -> str:
    """Maker and model of the scanner, as far as they are known names; empty where neither is."""
    return " ".join(str(header.public[k]) for k in ("Manufacturer", "ManufacturerModelName") if header.public.get(k))


def _for_viewer(hu: NDArray[Any], stride: int) -> NDArray[np.int16]:
    return np.asarray(np.clip(np.rint(hu[:, ::stride, ::stride]), -1024, 3071).astype(np.int16))


def _views_of(several: DerivedVolume, stride: int) -> dict[str, NDArray[np.int16]]:
    """Spread of samples, and the first of them with where it differs from the others."""
    found = {}
    if several.spread is not None:
        found["uncertainty"] = _for_viewer(several.spread, stride)
    if several.sample is not None and several.alarm is not None:
        found["sample"] = _for_viewer(several.sample, stride)
        found["alarm"] = _for_viewer(several.alarm / ALARM_STEP, stride)
    return found


def _save_view(folder: Path, view: CaseView) -> None:
    arrays: dict[str, Any] = {
        "spacing_mm_zyx": np.array(view.spacing_mm_zyx), "towards": np.array(view.towards), **view.volumes,
    }  # fmt: skip
    with written_aside(folder / "views" / f"{view.key}.npz") as draft, draft.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_views(folder: Path, keys: Sequence[str] | None = None) -> list[CaseView]:
    """The volumes that an evaluation kept for its report; ``keys`` leaves out those of an earlier evaluation."""
    views = []
    for path in sorted((folder / "views").glob("[!.]*.npz")):
        if keys is not None and path.stem not in keys:
            continue
        with np.load(path) as data:
            dz, dy, dx = (float(v) for v in data["spacing_mm_zyx"])
            volumes = {name: data[name] for name in VIEWED if name in data}
            where = str(data["towards"]) if "towards" in data else ""
        views.append(CaseView(path.stem, (dz, dy, dx), volumes, where))
    return views
