"""Encode everything that a store's catalog holds and its manifest lacks: plan, stream through an engine, commit."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from latentcache.errors import InputError
from latentcache.records import COMPRESSION, Encoding, LatentRole
from latentcache.store import LatentStore
from pipeline import encode
from pipeline.encode import Encoded, Encoder, EncodeTask, Prepared
from pipeline.encode_commit import GroupCommit, Progress
from pipeline.engine import EngineOptions, Outcome, Stage, stream
from pipeline.hu import Window
from pipeline.private import PrivateStore
from pipeline.volume import SeriesPointer

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
    """A VAE on a device, with torch's threads pinned.

    Raises:
        InputError: CUDA is asked for and this process has none, or the weights are unusable.
    """
    import torch

    from pipeline.vae import load_vae

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            "no CUDA device in this process",
            expected="a GPU with its driver, because --gpus asks for one",
            remedy="Give --gpus 0 to encode on the CPU, or start the worker on a GPU node with the CUDA image.",
        )
    torch.set_num_threads(settings.torch_threads)
    vae: Encoder = load_vae(settings.vae, device=device, memory_gib=settings.memory_gib)
    return vae


@dataclass(frozen=True)
class Bench:
    """What a worker keeps: the VAE on its device, and its own handle of the store."""

    vae: Encoder
    store: LatentStore


def set_up(device: str, *, store_url: str, fingerprint: str, encode_key: str, settings: EncodeSettings) -> Bench:
    """A worker's state. Checks first what a mount can get wrong: that it is the driver's store that the worker sees.

    Raises:
        InputError: The store or the VAE's weights are not there or not the driver's, or there is no CUDA device.
    """
    try:
        store = LatentStore.open(store_url)
    except InputError as error:
        raise InputError(
            f"a worker does not see the store {store_url}",
            expected="the same store at the same URL on every node",
            remedy=f"Mount it there, or use s3://. On the worker: {error.found}.",
        ) from error
    if store.secret_fingerprint != fingerprint:
        raise InputError(
            f"a worker sees another store at {store_url}",
            expected=f"the driver's store, secret fingerprint {fingerprint}",
            remedy=f"The worker's has {store.secret_fingerprint}: mount the same volume on every node.",
        )
    store.encoding(encode_key)
    vae = load_encoder(device, settings)
    found = encode.make_encoding(vae, settings.window, settings.pad_multiple_zyx).encode_key
    if found != encode_key:
        raise InputError(
            f"a worker's VAE gives encode key {found}",
            expected=f"the driver's, {encode_key}",
            remedy="Put the same weights' file on every node.",
        )
    return Bench(vae, store)


def run_task(bench: Bench, prepared: Prepared, *, settings: EncodeSettings) -> Encoded:
    """The stage's device part: encode and stage one task's latents."""
    import torch

    # OpenMP's count is a thread's own: an engine's new thread must not fall back to all cores, which changes low bits.
    if torch.get_num_threads() != settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    return encode.encode_one(
        bench.vae,
        settings.window,
        bench.store,
        prepared,
        round_trip_fraction=settings.round_trip_fraction,
        pad_multiple_zyx=settings.pad_multiple_zyx,
    )


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What planning needs of a catalog row; see ``encode.CatalogSeries``."""

    series_key: str
    role: str
    status: str
    source_digest: str


class Plan:
    """What a store lacks. ``count`` reads no archive places; ``tasks`` looks them up one by one, as they are taken."""

    def __init__(self, store: LatentStore, private: PrivateStore, encode_key: str, roles: Sequence[LatentRole]) -> None:
        names = ("series_key", "role", "status", "source_digest")
        columns = (store.catalog_table(names).column(name).to_pylist() for name in names)
        self.series = [PlanRow(*row) for row in zip(*columns, strict=True)]
        self.pairs = store.pairs()
        self.encode_key, self.roles, self.private = encode_key, roles, private
        held = store.manifest_table(("encode_key", "key", "role"))
        held = held.filter(pc.equal(held.column("encode_key"), encode_key))
        self.have = set(zip(held.column("key").to_pylist(), held.column("role").to_pylist(), strict=True))

    def count(self) -> int:
        return sum(1 for _ in self._plan(lambda key: SeriesPointer(key, ())))

    def tasks(self) -> Iterator[EncodeTask]:
        return self._plan(self.private.pointer)

    def _plan(self, pointer: Callable[[str], SeriesPointer]) -> Iterator[EncodeTask]:
        return encode.plan(self.series, self.pairs, self.have, self.encode_key, pointer, self.roles)


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
        InputError: The store is empty, the VAE's weights are unusable, no worker can start, or another driver holds
            the lease.
    """
    store = LatentStore.open(store_url)
    private = PrivateStore.open(store_url, private_url)
    encoding: Encoding = encode.make_encoding(load_encoder("cpu", settings), settings.window, settings.pad_multiple_zyx)
    plan = Plan(store, private, encoding.encode_key, settings.roles)
    if not plan.series:
        raise InputError(
            "a store without series", expected="a store that ingest filled", remedy="Run ctpipe ingest first."
        )
    summary = EncodeSummary(encoding.encode_key, plan.count(), already=len(plan.have), snapshot=store.snapshot)
    if dry_run or not summary.planned:
        return summary
    store.register_encoding(encoding)
    stage: Stage[EncodeTask, Prepared, Bench, Encoded] = Stage(
        prepare=functools.partial(encode.prepare, threads=settings.reader_threads),
        setup=functools.partial(
            set_up,
            store_url=store_url,
            fingerprint=store.secret_fingerprint,
            encode_key=encoding.encode_key,
            settings=settings,
        ),
        run=functools.partial(run_task, settings=settings),
    )
    progress = Progress(store.location, encoding.encode_key, summary.planned)
    device = "cuda" if options.wants_gpu else "cpu"
    with (
        store.writer() as writer,
        GroupCommit(writer, encoding.encode_key, device, progress.note) as commits,
        contextlib.closing(stream(plan.tasks(), stage, options)) as outcomes,
    ):
        for outcome in outcomes:
            commits.put(outcome)
            _tell(outcome, summary)
            if on_outcome is not None:
                on_outcome(outcome, summary.planned)
    progress.end()
    summary.committed = commits.committed
    summary.snapshot = LatentStore.open(store_url).snapshot
    return summary


def _tell(outcome: Outcome[EncodeTask, Encoded], summary: EncodeSummary) -> None:
    """Enter one outcome in the summary and the log; keys only."""
    if outcome.value is None:
        summary.failed[outcome.item.name] = outcome.error or "unknown"
        log.warning("task %s set aside: %s", outcome.item.name, outcome.error)
    elif outcome.value.pair is not None and outcome.value.pair.status != "ok":
        summary.unpaired_by_pixels[outcome.value.pair.pair_key] = outcome.value.pair.reason
    parts = outcome.value.seconds if outcome.value is not None else {}
    for name, value in (*outcome.seconds.items(), *parts.items()):
        summary.seconds[name] = summary.seconds.get(name, 0.0) + value


def parse_roles(text: str) -> tuple[LatentRole, ...]:
    """Roles from a comma-separated list."""
    known: dict[str, LatentRole] = {"thin": "thin", "thick": "thick", "thick_on_thin": "thick_on_thin"}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"roles {text!r}", expected=", ".join(known), remedy="For example --roles thin,thick_on_thin.")
    return tuple(known[name] for name in names)
