"""Encode everything that a store's catalog holds and its manifest lacks: plan, stream through an engine, commit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from latentcache import (
    COMPRESSION,
    LATENT_ROLES,
    Encoding,
    InputError,
    LatentRole,
    LatentStore,
    check_bf16_convolutions,
    compute_dtype,
    device_kind,
    open_on_worker,
)
from latentcache.maintenance import stale_rows
from pipeline.encode import task as encode
from pipeline.encode.plan import EncodePlan
from pipeline.encode.repair import Damage, find_damage, restore_pinned
from pipeline.encode.task import EncodeTask, Prepared
from pipeline.engines import (
    EngineOptions,
    GroupCommit,
    Outcome,
    Progress,
    Stage,
    StagedLatents,
    dashboard_of,
    note,
    pin,
    run_stage,
)
from pipeline.identity import PrivateStore
from pipeline.vae import Autoencoder, Tiling, as_encoded
from pipeline.volume import Window

if TYPE_CHECKING:
    from pipeline.refiner import RefinerFile


log = logging.getLogger("ctpipe.encode")


@dataclass(frozen=True)
class EncodeSettings:
    """Settings of encoding; everything that changes bytes is in the encode key.

    Attributes:
        vae: ``tiny`` or a path of MAISI weights.
        roles: Latents wanted.
        round_trip_fraction: Share of latents whose reconstruction is measured.
        memory_gib: Budget of the VAE's executor on each device; None lets it choose.
        pad_in_plane: Rows and columns are padded to a multiple of this; 64 for U-Nets with latent patch 2.
        tiling: None for the exact encoder; else the blended windows that others use, under a key of their own.
        gpu_share: A worker's share of its GPU's memory, where several share one and ``memory_gib`` is None.
        mirrored: Axis along which volumes are mirrored first, ``x`` or ``y``, under a key of their own and of the
            training split's pairs alone; empty for none.
        precision: ``auto`` (bf16 on a GPU, float32 on a CPU), ``fp32`` or ``bf16``.
        torch_threads: Threads of one device's arithmetic; pinned, because the count changes low bits of latents.
    """

    vae: str = "tiny"
    window: Window = field(default_factory=Window)
    roles: tuple[LatentRole, ...] = ("thin", "thick", "thick_on_thin")
    round_trip_fraction: float = 0.02
    memory_gib: float | None = None
    pad_in_plane: int = 32
    tiling: Tiling | None = None
    refiner: RefinerFile | None = None
    torch_threads: int = 2
    reader_threads: int = 2
    precision: str = "auto"
    gpu_share: float = 1.0
    mirrored: str = ""

    @property
    def pad_multiple_zyx(self) -> tuple[int, int, int]:
        return (COMPRESSION, self.pad_in_plane, self.pad_in_plane)

    @property
    def split(self) -> str | None:
        """The only split that is encoded; None for everything."""
        return "train" if self.mirrored else None

    @property
    def extra(self) -> dict[str, Any]:
        tiling = self.tiling.to_extra() if self.tiling else {}
        return {**tiling, "mirrored": self.mirrored} if self.mirrored else tiling


@dataclass
class EncodeSummary:
    """Outcome of an encode run; keys only."""

    encode_key: str
    planned: int = 0
    committed: int = 0
    already: int = 0
    stale: int = 0
    """Latents of archives that have changed since, or of another refiner; they stay until a run with ``refresh``."""
    retired: int = 0
    damaged: int = 0
    """Latents whose bytes were found damaged or gone; counted by a run with ``repair``."""
    restored: int = 0
    """Those of them whose very bytes came back, so that older snapshots read on too."""
    hopeless: dict[str, str] = field(default_factory=dict)
    """Damaged latents that stay because nothing can replace them, and why."""
    pinned: dict[str, int] = field(default_factory=dict)
    """Training runs whose pinned snapshot holds damaged latents that did not come back as they were."""
    mirrored: dict[str, str] = field(default_factory=dict)
    """Encode keys of mirrored volumes, by axis; counted with the others."""
    snapshot: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    unpaired_by_pixels: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def together(summaries: Sequence[EncodeSummary]) -> EncodeSummary:
    """One summary of a store's volumes as they are and mirrored; the first one's key, the last one's snapshot."""
    first = summaries[0]
    for other in summaries[1:]:
        for name in ("planned", "committed", "already", "stale", "retired", "damaged", "restored"):
            setattr(first, name, getattr(first, name) + getattr(other, name))
        for name in ("hopeless", "pinned", "failed", "unpaired_by_pixels", "mirrored"):
            getattr(first, name).update(getattr(other, name))
        for part, value in other.seconds.items():
            first.seconds[part] = first.seconds.get(part, 0.0) + value
        first.snapshot = other.snapshot
    return first


def load_encoder(device: str, settings: EncodeSettings) -> Autoencoder:
    """A VAE on a device, with torch's threads pinned.

    Raises:
        InputError: CUDA is asked for and this process has none, or the weights are unusable.
    """
    import torch

    from pipeline.vae import load_vae
    from pipeline.vae.streaming import share_gib

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            "no CUDA device in this process",
            expected="a GPU with its driver, because --gpus asks for one",
            remedy="Give --gpus 0 to encode on the CPU, or start the worker on a GPU node with the CUDA image.",
        )
    torch.set_num_threads(settings.torch_threads)
    dtype: torch.dtype = getattr(torch, compute_dtype(settings.precision, device))
    if dtype == torch.bfloat16:
        check_bf16_convolutions(torch.device(device))
    memory_gib = settings.memory_gib or share_gib(torch.device(device), settings.gpu_share)
    network = load_vae(settings.vae, device=device, memory_gib=memory_gib, dtype=dtype)
    vae: Autoencoder = as_encoded(network, settings.extra)
    return vae


def encoding_of(vae: Autoencoder, settings: EncodeSettings, device: str) -> Encoding:
    """The encoding of latents that workers on a kind of device make with these settings."""
    return encode.make_encoding(
        vae,
        settings.window,
        settings.pad_multiple_zyx,
        settings.extra,
        compute_dtype=compute_dtype(settings.precision, device),
        device_kind=device_kind(device),
    )


@dataclass(frozen=True)
class EncodeWorker:
    """State of a worker: the VAE on its device, and a handle of the store."""

    vae: Autoencoder
    store: LatentStore


def set_up(device: str, *, store_url: str, fingerprint: str, encode_key: str, settings: EncodeSettings) -> EncodeWorker:
    """A worker's state. Checks first what a mount can get wrong: that it is the driver's store that the worker sees.

    Raises:
        InputError: The store or the VAE's weights are not there or not the driver's, or there is no CUDA device.
    """
    store = open_on_worker(store_url, fingerprint)
    store.encoding(encode_key)
    vae = load_encoder(device, settings)
    found = encoding_of(vae, settings, device)
    if found.encode_key != encode_key:
        raise InputError(
            f"a worker's VAE gives encode key {found.encode_key} ({found.compute_dtype} on {found.device_kind})",
            expected=f"the driver's, {encode_key}",
            remedy="Put the same weights' file on every node, and nodes of one kind in the pool: latents of a CPU and "
            "of a GPU differ by more than a run may mix.",
        )
    return EncodeWorker(vae, store)


def run_task(worker: EncodeWorker, prepared: Prepared, *, settings: EncodeSettings) -> StagedLatents:
    """The stage's device part: encode and stage one task's latents."""
    pin(settings.torch_threads)
    return encode.encode_one(
        worker.vae,
        settings.window,
        worker.store.stage,
        prepared,
        round_trip_fraction=settings.round_trip_fraction,
        pad_multiple_zyx=settings.pad_multiple_zyx,
        refiner=settings.refiner,
        mirrored=settings.mirrored,
    )


def encode_store(
    store_url: str,
    settings: EncodeSettings,
    options: EngineOptions,
    *,
    private_url: str | None = None,
    dry_run: bool = False,
    refresh: bool = False,
    repair: bool = False,
    on_outcome: Callable[[Outcome[EncodeTask, StagedLatents], int], Any] | None = None,
) -> EncodeSummary:
    """Encode what is missing. Safe to kill and run again: at most the series in hand are lost.

    Latents of archives that have changed since are counted; with ``refresh`` they are retired first (a snapshot without
    them is committed), and so are missing and encoded anew. With ``repair`` every latent of the encoding is read first,
    and those that are damaged or gone are retired likewise, see `encode_repair`. ``on_outcome(outcome, planned)`` is
    called in the driver after each task.

    Raises:
        InputError: The store is empty, the VAE's weights are unusable, no worker can start, or another driver holds
            the lease.
    """
    refiner = _checked_refiner(settings)
    store = LatentStore.open(store_url)
    private = PrivateStore.open(store_url, private_url)
    device = "cuda" if options.wants_gpu else "cpu"
    encoding = encoding_of(load_encoder("cpu", settings), settings, device)
    if store.current_snapshot.rows("catalog") == 0:
        raise InputError(
            "a store without series", expected="a store that ingest filled", remedy="Run ctpipe ingest first."
        )
    summary = EncodeSummary(encoding.encode_key)
    if refresh and not dry_run:
        with store.writer() as writer:
            summary.retired = writer.retire(stale_rows(store, encoding.encode_key, settings.roles, refiner))
    damage = _retire_damaged(store, private, settings, summary, dry_run) if repair else Damage()
    summary.stale = stale_rows(store, encoding.encode_key, settings.roles, refiner).num_rows
    plan = EncodePlan(store, encoding.encode_key, private.pointer, settings.roles, refiner or "", settings.split)
    summary.planned, summary.already, summary.snapshot = len(plan), _held(store, encoding.encode_key), store.snapshot
    if dry_run or not summary.planned:
        return summary
    store.register_encoding(encoding)
    stage: Stage[EncodeTask, Prepared, EncodeWorker, StagedLatents] = Stage(
        prepare=functools.partial(encode.prepare, threads=settings.reader_threads),
        setup=functools.partial(
            set_up,
            store_url=store.url,
            fingerprint=store.secret_fingerprint,
            encode_key=encoding.encode_key,
            settings=replace(settings, gpu_share=options.gpus_per_worker),
        ),
        run=functools.partial(run_task, settings=settings),
    )
    progress = Progress(store.location, encoding.encode_key, summary.planned, dashboard=dashboard_of(options))

    def enter(outcome: Outcome[EncodeTask, StagedLatents]) -> dict[str, int]:
        if on_outcome is not None:
            on_outcome(outcome, summary.planned)
        return _enter(outcome, summary)

    with store.writer() as writer:
        commits = GroupCommit(writer, encoding.encode_key, device, progress.note)
        totals = run_stage(plan, stage, options, name="encode", progress=progress, commit=commits, on_outcome=enter)
    summary.failed, summary.committed = totals.failed, commits.committed
    for part, value in totals.seconds.items():
        summary.seconds[part] = summary.seconds.get(part, 0.0) + value
    if damage:
        _put_back(LatentStore.open(store_url), damage, summary)
    summary.snapshot = LatentStore.open(store_url).snapshot
    return summary


def _retire_damaged(
    store: LatentStore, private: PrivateStore, settings: EncodeSettings, summary: EncodeSummary, dry_run: bool
) -> Damage:
    """Look for damaged latents and, unless it is a dry run, retire those that can be made anew."""
    damage = find_damage(store, private.pointer, summary.encode_key, settings.roles, settings.reader_threads)
    summary.damaged, summary.hopeless, summary.pinned = len(damage), damage.hopeless, damage.pinned
    for name, reason in damage.hopeless.items():
        note(log, "damaged", logging.WARNING, f"latent {name}: {reason}", stage="encode")
    if damage.repairable and not dry_run:
        with store.writer() as writer:
            writer.retire(damage.paths())
    return damage


def _put_back(store: LatentStore, damage: Damage, summary: EncodeSummary) -> None:
    """Bring the lost bytes back to older snapshots where they were made again; name the runs that go without."""
    with store.writer():  # so that gc does not look on meanwhile
        summary.restored = restore_pinned(store, damage.repairable)
    if summary.restored == summary.damaged:
        summary.pinned = {}


def _checked_refiner(settings: EncodeSettings) -> str | None:
    """SHA-256 of the refiner of refined latents; None where none are wanted.

    Raises:
        InputError: Refined latents without a refiner, or one of another window.
    """
    if "refined_on_thin" not in settings.roles:
        return None
    if settings.refiner is None:
        raise InputError(
            "the role refined_on_thin without a refiner",
            expected="the refiner whose slices are to be encoded",
            remedy="Name its run with --refiner; `ctpipe train-refiner STORE RUN` makes one.",
        )
    from pipeline.refiner import check_window

    check_window(settings.refiner, settings.window)
    return settings.refiner.sha256


def _held(store: LatentStore, encode_key: str) -> int:
    """Latents under an encode key."""
    return int(store.manifest_table((), lambda rows: pc.equal(rows["encode_key"], encode_key)).num_rows)


def _enter(outcome: Outcome[EncodeTask, StagedLatents], summary: EncodeSummary) -> dict[str, int]:
    """Enter one outcome in the summary; returns figures for the log."""
    if outcome.value is None:
        return {}
    pair = outcome.value.pair
    if pair is not None and pair.status != "ok":
        summary.unpaired_by_pixels[pair.pair_key] = pair.reason
    for part, value in outcome.value.seconds.items():
        summary.seconds[part] = summary.seconds.get(part, 0.0) + value
    return {"latents": len(outcome.value.records)}


def parse_roles(text: str) -> tuple[LatentRole, ...]:
    """Roles from a comma-separated list."""
    known = {str(role): role for role in LATENT_ROLES}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise InputError(f"roles {text!r}", expected=", ".join(known), remedy="For example --roles thin,thick_on_thin.")
    return tuple(known[name] for name in names)
