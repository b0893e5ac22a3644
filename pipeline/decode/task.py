"""Decode: a stored latent back to HU on its series' own grid, and out as DICOM. One task is one output series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError, LatentRecord, LatentStore, PairRecord, SeriesRecord, store_of_worker
from latentcache.maintenance import refiner_of_digest
from latentcache.storage import refuse_existing
from pipeline.decode.compose import ComposeSettings, plain_round_trip
from pipeline.decode.samples import DerivedSeries, DerivedVolume, WriteSettings, average_samples, write_derived
from pipeline.forward_model import ProtocolFit, Protocols
from pipeline.vae import Autoencoder, own_decoder
from pipeline.volume import (
    SIMULATED_FLAG,
    Geometry,
    SeriesPointer,
    SourceHeader,
    Volume,
    Window,
    geometry_of,
    onto_field,
)
from pipeline.writing import Provenance, SeriesIdentity

if TYPE_CHECKING:
    from pipeline.refiner import RefinerFile


@dataclass(frozen=True)
class DecodeSettings:
    """Settings of decoding, composing and writing.

    Attributes:
        compose_stored: Stored thin latents too are handed over at the window's edges and projected onto the thick
            slices. By default they are written as the plain reconstruction, which shows the autoencoder's error.
    """

    write: WriteSettings
    compose: ComposeSettings = field(default_factory=ComposeSettings)
    restore_identity: bool = False
    compose_stored: bool = False


@dataclass(frozen=True)
class DecodeTask:
    """One output series.

    Attributes:
        key: Names the output folder: a series key, or a pair key where thin was generated from thick.
        kind: ``decoded``: a stored thin latent's reconstruction; ``generated``: sampled from the thick series.
        latents: (store URL, row) of every sample, at least one; all on one grid.
        condition: The condition's latent on the same grid, for residual detail.
        target: Grid of the latents' volume; slices beyond the thick series' extent are left out where thin was
            generated, since nothing was measured there.
        source: The series that the output is derived from, whose header and identity it carries.
        thick: The measured thick series, None for a thin series without one.
    """

    key: str
    kind: Literal["decoded", "generated"]
    latents: tuple[tuple[str, LatentRecord], ...]
    target: Geometry
    source: SeriesRecord
    source_at: SeriesPointer
    thick: SeriesRecord | None = None
    thick_at: SeriesPointer | None = None
    condition: tuple[str, LatentRecord] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    fit: ProtocolFit | None = None


@dataclass(frozen=True)
class PreparedDecode:
    """A task with what was read for it on a CPU worker."""

    task: DecodeTask
    header: SourceHeader
    thick: Volume | None


@dataclass(frozen=True)
class DecodeSelection:
    """The latents of a store that are to be decoded.

    Attributes:
        generated: Stores of sampled thin latents; where there are any, the pairs sampled into all of them are decoded.
        lost: Pairs that could not be sampled into ``generated``, and why.
        keys: Series or pair keys wanted; None for all.
        split: Only this split.
    """

    generated: Sequence[LatentStore] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    keys: Sequence[str] | None = None
    split: str | None = None

    def has(self, split: str, *keys: str) -> bool:
        """Whether an item of this split, known by any of these keys, is wanted."""
        return self.split in (None, split) and (self.keys is None or any(key in self.keys for key in keys))


EVERYTHING = DecodeSelection()
"""Every stored thin latent."""


def plan(
    store: LatentStore,
    pointer: Any,
    identity: Any,
    encode_key: str,
    selection: DecodeSelection = EVERYTHING,
    *,
    with_identity: bool = False,
    protocols: Protocols | None = None,
    start: RefinerFile | None = None,
) -> Iterator[DecodeTask]:
    """Tasks for the stored thin latents or, where the selection has generated stores, for the pairs sampled into all.

    Args:
        pointer: Series key to where its slices are (``PrivateStore.pointer``).
        identity: Series key to the original identifiers (``PrivateStore.identity``).
        protocols: Fits of the slice operator, from other patients' pairs.
        start: The refiner whose slices the sampled latents started from.

    Raises:
        InputError: A pair's refined latent was made by another refiner than ``start``.
    """

    def who(key: str) -> Mapping[str, Any]:
        return identity(key) if with_identity else {}

    tasks = _generated_tasks if selection.generated else _stored_tasks
    return tasks(store, pointer, who, encode_key, selection, protocols, start)


def _generated_tasks(
    store: LatentStore,
    pointer: Any,
    who: Any,
    encode_key: str,
    selection: DecodeSelection,
    protocols: Protocols | None,
    start: RefinerFile | None,
) -> Iterator[DecodeTask]:
    """One task per pair that was sampled into every generated store."""
    series = {s.series_key: s for s in store.series()}
    rows = [{r.key: r for r in g.records(encode_key, "thin")} for g in selection.generated]
    for pair in store.pairs():
        wanted = pair.status == "ok" and selection.has(pair.split, pair.pair_key, pair.thick_key)
        if not wanted or any(pair.pair_key not in r for r in rows):
            continue
        thick = series[pair.thick_key]
        condition = condition_of(store, pair, encode_key, start)
        yield DecodeTask(
            pair.pair_key,
            "generated",
            tuple((g.url, r[pair.pair_key]) for g, r in zip(selection.generated, rows, strict=True)),
            replace(geometry_of(series[pair.thin_key]), thickness_mm=thick.thickness_mm),
            source=thick,
            source_at=pointer(thick.series_key),
            thick=thick,
            thick_at=pointer(thick.series_key),
            condition=None if condition is None else (store.url, condition),
            identity=who(thick.series_key),
            fit=protocols.fit(pair) if protocols else None,
        )


def _stored_tasks(
    store: LatentStore,
    pointer: Any,
    who: Any,
    encode_key: str,
    selection: DecodeSelection,
    protocols: Protocols | None,
    start: RefinerFile | None,
) -> Iterator[DecodeTask]:
    """One task per stored thin latent."""
    series = {s.series_key: s for s in store.series()}
    partner = {p.thin_key: p for p in store.pairs() if p.status == "ok"}
    for row in store.records(encode_key, "thin"):
        thin, own = series[row.key], partner.get(row.key)
        if not selection.has(thin.split, row.key, own.pair_key if own else row.key):
            continue
        measured = series[own.thick_key] if own else None
        yield DecodeTask(
            row.key,
            "decoded",
            ((store.url, row),),
            geometry_of(thin),
            source=thin,
            source_at=pointer(thin.series_key),
            thick=measured,
            thick_at=pointer(measured.series_key) if measured else None,
            identity=who(thin.series_key),
            fit=protocols.fit(own) if protocols and own else None,
        )


def condition_of(
    store: LatentStore, pair: PairRecord, encode_key: str, start: RefinerFile | None
) -> LatentRecord | None:
    """The row of the latent whose decode is taken from the model's: of interpolated slices, or of refined ones.

    Raises:
        InputError: The refined latent is not there, or another refiner made it.
    """
    if start is None:
        return store.find(pair.pair_key, "thick_on_thin", encode_key)
    record = store.find(pair.pair_key, "refined_on_thin", encode_key)
    found = "" if record is None else refiner_of_digest(record.source_digest)
    if found != start.sha256:
        raise InputError(
            f"pair {pair.pair_key} without a refined latent"
            + (f", but one of the refiner {found[:12]}" if found else ""),
            expected=f"one by the refiner that the model starts from, {start.sha256[:12]}",
            remedy=f"Run `ctpipe encode STORE --refiner FILE --refresh` with the run's own {Path(start.path).name}.",
        )
    return record


def prepare(task: DecodeTask, *, threads: int = 2) -> PreparedDecode:
    """Read the thick series' pixels, and the source's header (CPU). Raises InputError when pixels are broken.

    Where a pair's fields of view differ, the thick series comes back on the target's pixels.
    """
    from pipeline.reading import read_series

    thick = read_series(task.thick_at, threads=threads) if task.thick_at else None
    if thick is not None and task.thick is not None and task.thick.series_key == task.source.series_key:
        header = thick.header
    else:
        header = read_series(task.source_at, threads=threads).header
    return PreparedDecode(task, header, onto_field(thick, task.target) if thick is not None else None)


def decode_one(vae: Autoencoder, prepared: PreparedDecode, *, settings: DecodeSettings) -> DerivedSeries:
    """Decode one task's latents, compose them with the measured series, and write the DICOM series.

    Several latents are samples: their mean is written, and with ``settings.write.uncertainty`` their standard
    deviation as a second series in a separate folder.

    Raises:
        InputError: The output folder exists, or a latent is corrupt.
    """
    task, thick = prepared.task, prepared.thick
    window = settings.write.window
    refuse_existing(settings.write.out_dir / task.key)
    kept = _measured_slices(task, thick)
    target = task.target.with_z(np.asarray(task.target.z_mm)[kept])
    volume = _composed(vae, prepared, target, kept, settings)
    row = task.latents[0][1]
    provenance = Provenance(
        kind=task.kind,
        source_key=task.source.series_key,
        window=(window.center, window.width),
        spacing_mm=round(target.spacing_mm_zyx[0], 6),
        encode_key=row.encode_key,
        vae_sha256=vae.sha256,
        decoder_sha256=own_decoder(vae),
        generation_key=row.source_digest if task.kind == "generated" else "",
        notes=("the thick slices were simulated from thin ones, not scanned",)
        if thick is not None and SIMULATED_FLAG in thick.flags
        else (),
    )
    identity = _identity(prepared, settings.restore_identity)
    return write_derived(task.key, volume, target, prepared.header, identity, provenance, settings.write)


def _composed(
    vae: Autoencoder, prepared: PreparedDecode, target: Geometry, kept: slice, settings: DecodeSettings
) -> DerivedVolume:
    """The task's latents as finished HU on ``target``, the slices ``kept`` of the latents' own volume."""
    task, thick, window = prepared.task, prepared.thick, settings.write.window
    samples = (decoded_hu(vae, window, url, row)[kept] for url, row in task.latents)
    if task.kind == "decoded" and not settings.compose_stored:
        (one,) = samples
        hu, figures = plain_round_trip(one, window, thick, target)
        return DerivedVolume(hu, None, 1, figures)
    composing = settings.compose
    measured = composing.measured(thick, target, task.fit) if thick is not None else None
    condition = None
    if composing.detail == "residual" and task.condition is not None and thick is not None:
        condition = decoded_hu(vae, window, *task.condition)[kept]
    volume = average_samples(samples, window, measured, target, composing, condition, alarm=settings.write.alarm_map)
    if task.fit is None or not task.fit.stated_is_wrong:
        return volume
    return replace(volume, figures={**volume.figures, "stated_profile": task.fit.stated_is_wrong})


def _measured_slices(task: DecodeTask, thick: Volume | None) -> slice:
    """Slices of the target that lie inside the thick series' extent; all of them for a reconstruction."""
    z = np.asarray(task.target.z_mm)
    if task.kind == "decoded" or thick is None:
        return slice(0, len(z))
    low, high = thick.geometry.extent_mm
    inside = np.flatnonzero((z >= low - 1e-6) & (z <= high + 1e-6))
    if not len(inside):
        raise InputError(
            f"pair {task.key} whose thin slices all lie outside the thick series",
            expected="overlapping extents",
            remedy="Ingest again: the pairing would refuse these two now.",
        )
    return slice(int(inside[0]), int(inside[-1]) + 1)


def decoded_hu(vae: Autoencoder, window: Window, url: str, row: LatentRecord) -> NDArray[np.float32]:
    """A stored latent through the decoder: (z, y, x) float32 HU, meaningful inside the window."""
    latent = np.asarray(store_of_worker(url).read(row), dtype=np.float32)
    return window.from_unit(np.asarray(vae.decode(latent, row.valid_zyx)))


def _identity(prepared: PreparedDecode, restore: bool) -> SeriesIdentity:
    """Whose series this is; the thick slices are named as sources too where they took part."""
    task, source = prepared.task, prepared.task.source
    thick = task.thick if task.thick is not None and task.thick.series_key != source.series_key else None
    if restore:
        own = SeriesIdentity.original(replace(prepared.header, identity={**task.identity, **prepared.header.identity}))
        more = prepared.thick.header.sop_instance_uids if thick is not None and prepared.thick is not None else ()
    else:
        keys = {"patient_key": source.patient_key, "study_key": source.study_key, "frame_key": source.frame_key}
        own = SeriesIdentity.pseudonymous(**keys, source_key=source.series_key, source_slices=source.n_slices)
        more = ()
        if thick is not None:
            other = SeriesIdentity.pseudonymous(**keys, source_key=thick.series_key, source_slices=thick.n_slices)
            more = other.source_sop_uids
    return replace(own, source_sop_uids=tuple(dict.fromkeys((*own.source_sop_uids, *more))))
