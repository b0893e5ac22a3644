"""Encode everything that a store's catalog holds and its manifest lacks: plan, stream through an engine, commit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentcache.commit import Writer
from latentcache.errors import InputError
from latentcache.records import COMPRESSION, Encoding, LatentRole
from latentcache.store import LatentStore
from pipeline import encode
from pipeline.encode import Encoded, Encoder, EncodeTask, Prepared
from pipeline.engine import EngineOptions, Outcome, Stage, stream
from pipeline.hu import Window
from pipeline.private import PrivateStore

log = logging.getLogger("ctpipe.encode")


@dataclass(frozen=True)
class EncodeSettings:
    """What to encode and how; everything that changes bytes is in the encode key.

    Attributes:
        vae: ``tiny`` or a path of MAISI weights.
        roles: Latents wanted.
        round_trip_fraction: Share of latents whose round trip is measured.
        memory_gib: Budget of the VAE's executor on each device; None lets it choose.
        pad_in_plane: Rows and columns are padded to a multiple of this; 64 for U-Nets with latent patch 2.
        torch_threads: Threads of one device's arithmetic; pinned, because the count changes low bits of latents.
    """

    vae: str = "tiny"
    window: Window = field(default_factory=Window)
    roles: tuple[LatentRole, ...] = ("thin", "thick", "thick_on_thin")
    round_trip_fraction: float = 0.02
    memory_gib: float | None = None
    pad_in_plane: int = 32
    torch_threads: int = 2
    reader_threads: int = 2

    @property
    def pad_multiple_zyx(self) -> tuple[int, int, int]:
        return (COMPRESSION, self.pad_in_plane, self.pad_in_plane)


@dataclass
class EncodeSummary:
    """What a run did; keys only."""

    encode_key: str
    planned: int = 0
    committed: int = 0
    already: int = 0
    snapshot: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unpaired_by_pixels: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def load_encoder(device: str, settings: EncodeSettings) -> Encoder:
    """A VAE on a device, with torch's threads pinned."""
    import torch

    from pipeline.vae import load_vae

    torch.set_num_threads(settings.torch_threads)
    vae: Encoder = load_vae(settings.vae, device=device, memory_gib=settings.memory_gib)
    return vae


@functools.lru_cache(maxsize=4)
def _store_for_staging(url: str) -> LatentStore:
    """A worker's own handle: opened once a process."""
    return LatentStore.open(url)


def run_task(vae: Encoder, prepared: Prepared, *, store_url: str, settings: EncodeSettings) -> Encoded:
    """The stage's device part: encode and stage one task's latents."""
    store = _store_for_staging(store_url)
    return encode.encode_one(
        vae,
        settings.window,
        store,
        prepared,
        round_trip_fraction=settings.round_trip_fraction,
        pad_multiple_zyx=settings.pad_multiple_zyx,
    )


def plan_tasks(
    store: LatentStore, private: PrivateStore, encode_key: str, roles: Sequence[LatentRole]
) -> tuple[list[EncodeTask], int]:
    """Tasks for every latent that is missing, and the number already there."""
    have: set[tuple[str, str]] = {(r.key, r.role) for r in store.records(encode_key)}
    tasks = list(encode.plan(store.series(), store.pairs(), have, encode_key, private.pointer, roles))
    return tasks, len(have)


def encode_store(
    store_url: str,
    settings: EncodeSettings,
    options: EngineOptions,
    *,
    private_url: str | None = None,
    dry_run: bool = False,
    on_outcome: Callable[[Outcome[EncodeTask, Encoded], int], Any] | None = None,
) -> EncodeSummary:
    """Encode what is missing. Safe to kill and run again: at most the series in hand are lost.

    ``on_outcome(outcome, planned)`` is called in the driver after each task.

    Raises:
        InputError: The store is empty, the VAE's weights are unusable, or another driver holds the lease.
    """
    store = LatentStore.open(store_url)
    private = PrivateStore.open(store_url, private_url)
    probe = load_encoder("cpu", settings)
    encoding: Encoding = encode.make_encoding(probe, settings.window, settings.pad_multiple_zyx)
    del probe
    tasks, already = plan_tasks(store, private, encoding.encode_key, settings.roles)
    if not store.series():
        raise InputError(
            "a store without series", expected="a store that ingest filled", remedy="Run ctpipe ingest first."
        )
    summary = EncodeSummary(encoding.encode_key, planned=len(tasks), already=already, snapshot=store.snapshot)
    if dry_run or not tasks:
        return summary
    store.register_encoding(encoding)
    stage: Stage[EncodeTask, Prepared, Encoder, Encoded] = Stage(
        prepare=functools.partial(encode.prepare, threads=settings.reader_threads),
        setup=functools.partial(load_encoder, settings=settings),
        run=functools.partial(run_task, store_url=store_url, settings=settings),
    )
    with store.writer() as writer:
        for outcome in stream(tasks, stage, options):
            if outcome.value is None:
                summary.failed[outcome.item.name] = outcome.error or "unknown"
                log.warning("task %s set aside: %s", outcome.item.name, outcome.error)
            else:
                _commit(store, writer, outcome, summary)
            for name, value in outcome.seconds.items():
                summary.seconds[name] = summary.seconds.get(name, 0.0) + value
            if on_outcome is not None:
                on_outcome(outcome, len(tasks))
    summary.snapshot = LatentStore.open(store_url).snapshot
    return summary


def _commit(store: LatentStore, writer: Writer, outcome: Outcome[EncodeTask, Encoded], summary: EncodeSummary) -> None:
    """One task's pair proof, then its latents: a crash between the two leaves work to do again, never a false row."""
    encoded = outcome.value
    assert encoded is not None
    if encoded.pair is not None:
        writer.append_catalog([], [encoded.pair])
        if encoded.pair.status != "ok":
            summary.unpaired_by_pixels[encoded.pair.pair_key] = encoded.pair.reason
    timing = {"key": encoded.name, "stage": "encode", "attempts": outcome.attempts, **outcome.seconds}
    summary.committed += len(writer.commit(encoded.records, timings=[timing]))


def parse_roles(text: str) -> tuple[LatentRole, ...]:
    """Roles from a comma-separated list."""
    known: dict[str, LatentRole] = {"thin": "thin", "thick": "thick", "thick_on_thin": "thick_on_thin"}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"roles {text!r}", expected=", ".join(known), remedy="For example --roles thin,thick_on_thin.")
    return tuple(known[name] for name in names)
