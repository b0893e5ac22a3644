"""Whether latents are of the series whose keys they bear: each is made again from its archive and compared.

A latent's own checksums only say that it is as it was committed. Before members were recognised by what they are, an
archive that changed between ingest and encode could put another series under a key, with a digest that the catalog had
vouched for; only the pixels tell. The price is that of encoding: say how large a sample is enough.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from latentcache import CorruptLatentError, Encoding, InputError, LatentMeta, LatentRecord, LatentStore
from pipeline.encode.plan import EncodePlan
from pipeline.encode.repair import reopen_pairs
from pipeline.encode.task import EncodeTask, encode_one, prepare
from pipeline.vae import Autoencoder, as_encoded
from pipeline.volume import SeriesPointer, Window

ALIKE = 0.03
"""Most RMS difference of one series' latents, as a share of their standard deviation; devices differ by 0.006."""


@dataclass
class SourceCheck:
    """Outcome of comparing latents with their archives.

    Attributes:
        compared: Latents made again.
        skipped: Latents of encodings by another VAE than the one given, by encode key.
        unread: Tasks whose archives could not be read as the catalog describes them, and why: nothing is known of them.
        foreign: Rows that hold another series, by path, each with the difference found.
    """

    compared: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, tuple[LatentRecord, float]] = field(default_factory=dict)


@dataclass
class _Compare:
    """In place of the store that latents are staged in: holds each against the one that is committed."""

    store: LatentStore
    result: SourceCheck

    def stage(self, array: NDArray[np.float16], meta: LatentMeta) -> LatentRecord:
        row = self.store.find(meta.key, meta.role, meta.encode_key)
        assert row is not None
        self.result.compared += 1
        try:
            held = self.store.read(row).astype(np.float32)
        except CorruptLatentError:
            return row  # `verify` says so without an archive
        difference = relative_difference(held, array.astype(np.float32))
        if not difference <= ALIKE:
            self.result.foreign[row.path] = (row, difference)
        return row


def relative_difference(held: NDArray[np.float32], made: NDArray[np.float32]) -> float:
    """RMS of the difference as a share of the standard deviation of what was made; infinite for unlike shapes."""
    if held.shape != made.shape:
        return float("inf")
    spread = float(np.std(made, dtype=np.float64)) or 1.0
    return float(np.sqrt(np.mean((held - made) ** 2, dtype=np.float64))) / spread


def check_sources(
    store: LatentStore,
    pointer: Callable[[str], SeriesPointer],
    vae: Autoencoder,
    *,
    sample: float = 1.0,
    on_task: Callable[[int, int], Any] = lambda done, planned: None,
) -> SourceCheck:
    """Make latents again from their archives and compare them with those committed. Changes nothing.

    Args:
        pointer: Where a series is, by its key.
        vae: Latents that another VAE made are counted and left out.
        sample: Share of the pairs and series to compare, chosen by their keys.
        on_task: Called with the tasks done and planned of an encoding.
    """
    result = SourceCheck()
    comparison = _Compare(store, result)
    for encode_key in sorted({key for key, _ in store.encoded()}):
        encoding = store.encoding(encode_key)
        if encoding.vae_sha256 != vae.sha256:
            result.skipped[encode_key] = len(store.records(encode_key))
            continue
        encoder = as_encoded(vae, encoding.extra)
        plan = EncodePlan(store, "", functools.partial(_pointer, pointer))  # as if nothing were encoded yet
        for done, task in enumerate(_held(store, plan, encode_key, sample), start=1):
            try:
                _again(encoder, encoding, comparison, task)
            except InputError as error:
                result.unread[task.name] = str(error)
            on_task(done, len(plan))
    return result


def retire_foreign(store: LatentStore, found: SourceCheck) -> tuple[int, int]:
    """Take latents of another series out of the manifest; returns how many, and how many pairs are to be proved anew.

    Older snapshots keep the rows, so that runs pinned to them go on as they began.
    """
    if not found.foreign:
        return 0, 0
    with store.writer() as writer:
        retired = writer.retire(pa.table({"path": pa.array(sorted(found.foreign), pa.string())}))
        return retired, reopen_pairs(store, writer, {row.key for row, _ in found.foreign.values()})


def _again(vae: Autoencoder, encoding: Encoding, comparison: _Compare, task: EncodeTask) -> None:
    encode_one(
        vae,
        Window.of(encoding),
        comparison.stage,
        prepare(task),
        round_trip_fraction=0.0,
        pad_multiple_zyx=encoding.pad_multiple_zyx,
        mirrored=encoding.mirrored,
    )


def _held(store: LatentStore, plan: EncodePlan, encode_key: str, sample: float) -> Iterator[EncodeTask]:
    """The tasks whose latents are there, each with those alone; no pixel proof."""
    for task in plan:
        if int(hashlib.sha256(task.name.encode()).hexdigest()[:8], 16) >= sample * 2**32:
            continue
        wanted = tuple(want for want in task.wanted if store.find(want.key, want.role, encode_key) is not None)
        if wanted:
            yield replace(task, encode_key=encode_key, wanted=wanted, pair=None)


def _pointer(pointer: Callable[[str], SeriesPointer], key: str) -> SeriesPointer:
    """The pointer, or one without slices, which reading refuses: one unknown series must not end the check."""
    try:
        return pointer(key)
    except InputError:
        return SeriesPointer(key, ())
