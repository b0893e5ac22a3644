"""Evaluate a store's held-out pairs one by one, with bounded memory; a case that is done is not done again."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache.errors import CtpipeError, InputError
from latentcache.records import PairRecord
from latentcache.store import LatentStore
from pipeline.compose import ComposeSettings, compose
from pipeline.encode import Encoder
from pipeline.evaluate import CaseScores, common_slices, interpolations, score, summarise
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.private import PrivateStore
from pipeline.protocol_fit import ProtocolFit, Protocols
from pipeline.report import CaseView
from pipeline.volume import Volume
from pipeline.volume_reader import read_series

log = logging.getLogger("ctpipe.evaluate")

VIEWED = ("truth", "nearest", "linear", "cubic", "model", "vae_ceiling")


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


def evaluate_pairs(
    store: LatentStore,
    private: PrivateStore,
    vae: Encoder,
    pairs: Sequence[PairRecord],
    generated: LatentOf,
    settings: EvaluationSettings,
    folder: Path,
) -> Iterator[CaseScores]:
    """Score every method on each pair and yield cases in order; ``generated`` gives the model's raw latents of a pair.

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
    for number, pair in enumerate(pairs):
        path = folder / "cases" / f"{pair.pair_key}.json"
        done = _finished(path, settings.identity)
        if done is not None:
            yield done
            continue
        try:
            view_folder = folder if number < settings.views else None
            case = _evaluate(store, private, vae, pair, generated, settings, protocols.fit(pair), view_folder)
        except CtpipeError as error:
            log.warning("pair %s could not be evaluated: %s", pair.pair_key, error)
            case = CaseScores(pair.pair_key, pair.category, 0, {}, {"case": str(error)}, {})
        _write(path, json.dumps({"identity": settings.identity, **asdict(case)}))
        yield case


def case_volumes(
    store: LatentStore,
    vae: Encoder,
    pair: PairRecord,
    thick: Volume,
    thin: Geometry,
    generated: LatentOf,
    settings: EvaluationSettings,
    fit: ProtocolFit | None = None,
) -> tuple[dict[str, NDArray[Any]], Mapping[str, Any]]:
    """Every method's volume in HU on the measured part of the thin grid, and the model's consistency figures.

    The model's output is composed as ``ctpipe decode --checkpoint`` composes it, with the protocol's slice profile
    fitted on other patients.
    """
    window, shape = settings.window, thin.shape_zyx
    inside = common_slices(thick.geometry, thin)
    target = thin.with_z(np.array(thin.z_mm)[inside])

    def decoded(latent: NDArray[Any]) -> NDArray[np.float32]:
        return window.from_unit(np.asarray(vae.decode(np.asarray(latent, dtype=np.float32), shape))[inside])

    methods: dict[str, NDArray[Any]] = dict(interpolations(thick, target))
    condition = store.find(pair.pair_key, "thick_on_thin", settings.encode_key)
    if condition is not None:
        methods["condition_round_trip"] = decoded(store.read(condition))
    residual = settings.compose.detail == "residual"
    if residual and condition is None:
        raise InputError(
            f"pair {pair.pair_key} without a thick_on_thin latent",
            expected="one, because residual detail needs the condition decoded",
            remedy="Encode with --roles thin,thick,thick_on_thin, or use --detail absolute.",
        )
    composing = settings.compose
    if fit is not None:
        composing = replace(
            composing, profile=composing.profile or fit.profile, noise_hu=composing.noise_hu or fit.noise_hu
        )
    condition_hu = methods["condition_round_trip"] if residual else None
    methods["model"], figures = compose(
        decoded(generated(pair)), window, thick, target, composing, condition_hu=condition_hu
    )
    ceiling = store.find(pair.thin_key, "thin", settings.encode_key)
    if ceiling is not None:
        methods["vae_ceiling"] = decoded(store.read(ceiling))
    return methods, figures


def _evaluate(
    store: LatentStore,
    private: PrivateStore,
    vae: Encoder,
    pair: PairRecord,
    generated: LatentOf,
    settings: EvaluationSettings,
    fit: ProtocolFit | None,
    view_folder: Path | None,
) -> CaseScores:
    thick = read_series(private.pointer(pair.thick_key))
    thin = read_series(private.pointer(pair.thin_key))
    methods, figures = case_volumes(store, vae, pair, thick, thin.geometry, generated, settings, fit)
    truth = thin.hu[common_slices(thick.geometry, thin.geometry)]
    if view_folder is not None:
        _save_view(view_folder, pair.pair_key, thin.geometry.spacing_mm_zyx, {**methods, "truth": truth})
    misfit = {"rms_hu": figures.get("rms_after_hu"), **figures}
    return score(pair.pair_key, pair.category, truth, methods, settings.window, misfit)


def _save_view(
    folder: Path, key: str, spacing: tuple[float, float, float], volumes: Mapping[str, NDArray[Any]]
) -> None:
    """Volumes for the viewer as int16 HU; ``truth`` and the methods that a reader compares."""
    chosen = {n: np.clip(np.rint(volumes[n]), -1024, 3071).astype(np.int16) for n in VIEWED if n in volumes}
    (folder / "views").mkdir(exist_ok=True)
    draft = folder / "views" / f".{key}.part.npz"
    np.savez_compressed(draft, spacing_mm_zyx=np.array(spacing), **chosen)
    draft.replace(folder / "views" / f"{key}.npz")


def load_views(folder: Path) -> list[CaseView]:
    """The volumes that an evaluation kept for its report."""
    views = []
    for path in sorted((folder / "views").glob("[!.]*.npz")):
        with np.load(path) as data:
            dz, dy, dx = (float(v) for v in data["spacing_mm_zyx"])
            volumes = {name: data[name] for name in VIEWED if name in data}
        views.append(CaseView(path.stem, (dz, dy, dx), volumes))
    return views


def finish(folder: Path, cases: Sequence[CaseScores], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write ``metrics.json``: the facts, means over patients, and every case."""
    document = {**facts, **summarise(cases), "by_case": [asdict(case) for case in cases]}
    _write(folder / "metrics.json", json.dumps(document, indent=1, sort_keys=True))
    return document


def _finished(path: Path, identity: str) -> CaseScores | None:
    if not path.is_file():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    return CaseScores(**raw) if raw.pop("identity") == identity else None


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
