"""Decode what a store holds into DICOM series: plan, stream through an engine, count what came of it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentcache import Encoding, InputError, LatentStore
from pipeline.decode import task as decode
from pipeline.decode.samples import DerivedSeries
from pipeline.decode.task import EVERYTHING, DecodeSelection, DecodeSettings, DecodeTask, PreparedDecode
from pipeline.engines import (
    EngineOptions,
    Outcome,
    Progress,
    Stage,
    check_seen,
    dashboard_of,
    mark,
    note,
    pin,
    run_stage,
)
from pipeline.forward_model import Protocols
from pipeline.identity import PrivateStore
from pipeline.reading import read_series
from pipeline.vae import Autoencoder, load_decoder
from pipeline.writing import is_written_series

log = logging.getLogger("ctpipe.decode")


@dataclass
class DecodeSummary:
    """Outcome of a decode run; keys and figures only."""

    planned: int = 0
    already: int = 0
    written: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def set_up(device: str, *, seen: Path, threads: int, load: Callable[[str], Autoencoder]) -> Autoencoder:
    """A worker's state. Checks first that it is the driver's output folder that the worker writes to.

    Raises:
        InputError: The worker does not see the driver's mark in the folder, or the VAE is not the right one.
    """
    check_seen(seen)
    pin(threads)
    return load(device)


def run_task(vae: Autoencoder, prepared: PreparedDecode, *, settings: DecodeSettings, threads: int) -> DerivedSeries:
    """The stage's device part: decode, compose and write one series."""
    pin(threads)
    return decode.decode_one(vae, prepared, settings=settings)


@dataclass(frozen=True)
class VaeSettings:
    """The VAE of a worker.

    Attributes:
        spec: ``tiny`` or a path.
        memory_gib: Most memory that it may take; None: what is free.
        threads: Threads of one device's arithmetic; pinned, for equal bytes on every engine.
        precision: ``auto`` (the latents' own where the device is of their kind), ``fp32`` or ``bf16``.
    """

    spec: str = "tiny"
    memory_gib: float | None = None
    threads: int = 2
    precision: str = "auto"

    def loader(self, encoding: Encoding, gpu_share: float = 1.0) -> Callable[[str], Autoencoder]:
        """Return a function that loads it on a device, and refuses one that did not encode these latents."""
        return functools.partial(
            load_decoder,
            spec=self.spec,
            encoding=encoding,
            precision=self.precision,
            memory_gib=self.memory_gib,
            gpu_share=gpu_share,
        )


def decode_store(
    store: LatentStore,
    private: PrivateStore,
    encode_key: str,
    settings: DecodeSettings,
    options: EngineOptions,
    *,
    vae: VaeSettings,
    selection: DecodeSelection = EVERYTHING,
    on_outcome: Callable[[Outcome[DecodeTask, DerivedSeries], int], Any] | None = None,
) -> DecodeSummary:
    """Write every series wanted that is not in the output folder yet; a series that fails does not stop the others.

    Raises:
        InputError: Nothing matches, the VAE is not the one that encoded the store, or no worker can start.
    """
    tasks = _planned(store, private, encode_key, settings, selection)
    out = Path(settings.write.out_dir)
    taken = [task for task in tasks if os.path.lexists(out / task.key)]
    odd = {task.key for task in taken if not is_written_series(out / task.key)}
    here = {task.key for task in taken}
    todo = [task for task in tasks if task.key not in here]
    summary = DecodeSummary(planned=len(tasks), already=len(here) - len(odd), failed=dict(selection.lost))
    for key in sorted(odd):
        said = summary.failed[key] = f"{key} in the output folder is no series that decode wrote: move it away"
        note(log, "set_aside", logging.WARNING, said, series_key=key, stage="decode", outcome="InputError")
    load = vae.loader(store.encoding(encode_key), options.gpus_per_worker)
    with mark(out) if todo else contextlib.nullcontext(out) as seen:
        stage: Stage[DecodeTask, PreparedDecode, Autoencoder, DerivedSeries] = Stage(
            prepare=functools.partial(decode.prepare, threads=2),
            setup=functools.partial(set_up, seen=seen, threads=vae.threads, load=load),
            run=functools.partial(run_task, settings=settings, threads=vae.threads),
        )
        progress = Progress(store.location, encode_key, len(todo), "decode", dashboard_of(options))

        def enter(outcome: Outcome[DecodeTask, DerivedSeries]) -> dict[str, int]:
            if on_outcome is not None:
                on_outcome(outcome, len(todo))
            return _enter(outcome, summary)

        if todo:
            totals = run_stage(todo, stage, options, name="decode", progress=progress, on_outcome=enter)
            summary.failed |= totals.failed
            summary.seconds = totals.seconds
    return summary


def note_certificates(log: logging.Logger, done: DerivedSeries, stage: str) -> None:
    """Warn of every certificate of a written series that fails, or that could not be computed in some tissue."""
    for name, kind in (("certificate", ""), ("sample_certificate", " (its sample)")):
        judged = done.figures.get(name, {})
        if judged.get("failing") or judged.get("missing"):
            text = f"series {done.key}{kind}: {judged['said']}"
            note(log, "certificate", logging.WARNING, text, series_key=done.key, stage=stage)


def _planned(
    store: LatentStore, private: PrivateStore, encode_key: str, settings: DecodeSettings, selection: DecodeSelection
) -> list[DecodeTask]:
    """The tasks of a selection.

    Raises:
        InputError: There is none, and none was lost either.
    """
    protocols = None
    if settings.compose.consistency and (selection.generated or settings.compose_stored):
        series = {s.series_key: s for s in store.series()}
        read = functools.partial(read_series, threads=2)
        protocols = Protocols(store.pairs(), series, private.pointer, read)
    tasks = list(
        decode.plan(
            store,
            private.pointer,
            private.identity,
            encode_key,
            selection,
            with_identity=settings.restore_identity,
            protocols=protocols,
            start=settings.compose.start,
        )
    )
    if not tasks and not selection.lost:
        raise InputError(
            "no stored latent that matches",
            expected="at least one thin latent" + (f" in split {selection.split}" if selection.split else ""),
            remedy="Check --split or --series against `ctpipe status STORE`.",
        )
    return tasks


def _enter(outcome: Outcome[DecodeTask, DerivedSeries], summary: DecodeSummary) -> dict[str, int]:
    """Enter a written series in the summary; returns figures for the log."""
    done = outcome.value
    if done is None:
        return {}
    summary.written[outcome.item.key] = {
        "folders": list(done.folders),
        "series_uid": done.series_uid,
        "slices": done.n_slices,
        **done.figures,
    }
    note_certificates(log, done, "decode")
    return {"slices": done.n_slices}
