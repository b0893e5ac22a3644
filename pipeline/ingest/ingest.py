"""Ingest: archives to catalog, pairs and splits. Wiring: each step is a plain function of another module.

Work goes in batches of archives. A batch is scanned, joined, keyed, paired and split, then committed in one snapshot;
PRIVATE is written before it and the archives are marked as done after it, so that a run killed at any instant is
continued by the next and ends in the same catalog.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from latentcache import LatentStore, StoreError, StoreExistsError
from pipeline.archive import DEFAULT_CATEGORIES, FoundArchive, stream_archives
from pipeline.engines import EngineOptions
from pipeline.identity import UNUSABLE, Keys, PrivateStore
from pipeline.ingest.batch import BatchWriter
from pipeline.ingest.corrections import apply_overrides, pair_lone_thicks, relabel, retire_complaints
from pipeline.ingest.overrides import Overrides
from pipeline.ingest.plan import KNOWN, ListingPlan, found_table
from pipeline.ingest.scan import CRASHED, ArchiveScan, ScanJob, scan_archive, scans_in_order
from pipeline.ingest.summary import IngestSummary, summarise
from pipeline.pairing import PatientSplits

log = logging.getLogger("ctpipe.ingest")
BATCH = 256
COMPACT_EVERY = 32
"""Batches after which PRIVATE's fragments are merged: each batch looks through all of them."""


@dataclass(frozen=True)
class IngestOptions:
    """Options of ingest.

    Attributes:
        categories: Allow-list of labels; a folder of another name gives ``unlabelled``.
        overrides: The user's CSVs.
        verify_pixels: Decode every series instead of trusting its headers until encode.
        dry_run: Say what would be read, and stop.
        rescan: Read archives again although nothing about them changed.
        workers: Processes that scan; 1 scans in this one.
        cluster: Scan on this engine's workers instead.
        resample_variable_spacing: Take series of uneven spacing as if scanned evenly, see `even_spacing`.
        simulate_thick_mm: Give every study without a thick series a simulated one of this slice thickness.
        pair_across_fov: Pair thick series that no thin one has the grid of with one whose field of view is within.
        exclude_folders: Folders not to enter, such as the store's own.
        batch: Archives a commit.
    """

    categories: tuple[str, ...] = DEFAULT_CATEGORIES
    overrides: Overrides = field(default_factory=Overrides)
    verify_pixels: bool = False
    dry_run: bool = False
    rescan: bool = False
    workers: int = 1
    cluster: EngineOptions | None = None
    pair_across_fov: bool = False
    resample_variable_spacing: bool = False
    simulate_thick_mm: float | None = None
    exclude_folders: tuple[Path, ...] = ()
    batch: int = BATCH


def open_stores(store_url: str, private_url: str | None = None, seed: int = 0) -> tuple[LatentStore, PrivateStore]:
    """The store and its private part, made if they do not exist.

    Raises:
        StoreError: The secret is not the one that the store was made with.
    """
    private = PrivateStore.open(store_url, private_url, create=not LatentStore.exists(store_url))
    if not LatentStore.exists(store_url):
        with contextlib.suppress(StoreExistsError):  # another first ingest was a moment earlier
            LatentStore.create(store_url, secret_fingerprint=private.fingerprint, split_seed=seed)
    store = LatentStore.open(store_url)
    check_secret(store, private)
    return store, private


def check_secret(store: LatentStore, private: PrivateStore) -> None:
    """Refuse a secret that is not the store's: every key would differ, and everything be stored a second time."""
    if store.secret_fingerprint != private.fingerprint:
        raise StoreError(
            "the secret is not the one that this store was made with",
            expected=f"the secret with fingerprint {store.secret_fingerprint}",
            remedy="Give the private folder that belongs to this store with --private, or set CTPIPE_SECRET back.",
        )


def ingest(
    dataset: str,
    store: LatentStore | None,
    private: PrivateStore | None,
    options: IngestOptions | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> IngestSummary:
    """Bring every archive of a dataset into the store's catalog.

    Archives are read while the rest of the dataset is still being listed.

    Args:
        dataset: A folder, a zip, or an object store's URL.
        store: The store; None only with ``dry_run`` where there is none yet.
        private: Its private part; likewise.
        options: See :class:`IngestOptions`.
        progress: Gets the archives done and the archives to read, of those listed so far.

    Raises:
        InputError: The dataset does not exist, or another driver is writing to the store.
    """
    options = options or IngestOptions()
    found = stream_archives(dataset, options.categories, options.exclude_folders)
    listing = _listing(found, dataset, private, options)
    jobs = ((one, digest, options.verify_pixels) for one, digest in listing.jobs())
    if options.dry_run or private is None or store is None:
        collections.deque(jobs, maxlen=0)
        return IngestSummary(dry_run=True, archives=_dry_counts(listing, private is None))
    first = list(itertools.islice(jobs, 1))  # a tree without anything new is listed before the lease is taken
    with store.writer():
        splits = PatientSplits(store, options.overrides.splits)
        writer = BatchWriter(
            store,
            private,
            options.overrides,
            splits,
            options.pair_across_fov,
            options.resample_variable_spacing,
            options.simulate_thick_mm,
        )
        done = 0
        for number, batch in enumerate(_batches(itertools.chain(first, jobs), options), start=1):
            writer.commit(batch)
            done += len(batch)
            progress(done, listing.to_scan)
            if number % COMPACT_EVERY == 0:
                private.compact()
        retire_complaints(store, private, dataset, listing.unusable_gone)
        relabel(store, private, listing.relabelled)
        if options.pair_across_fov:
            pair_lone_thicks(store, private, splits)
        refused = apply_overrides(store, private, splits, options.overrides, listing.left_out)
    private.compact()
    counts = {**writer.outcomes, "excluded": len(listing.left_out)}
    counts["unchanged"] = listing.counts["unchanged"] + writer.outcomes["unchanged"]
    return summarise(store, {name: n for name, n in counts.items() if n}, refused)


def _listing(
    found: Iterable[FoundArchive], dataset: str, private: PrivateStore | None, options: IngestOptions
) -> ListingPlan:
    """The comparison of what is found with what PRIVATE knows; of nothing, where there is no store yet."""

    def excludes(url: str) -> bool:
        return options.overrides.excludes_archive(url, dataset)

    if private is None:
        nothing = found_table([], Keys(b"")).append_column("digest", pa.array([], pa.string()))
        return ListingPlan(found, nothing, Keys(b""), excludes)
    unusable = private.table("archives", ("archive_key",), pc.field("status") == UNUSABLE)["archive_key"].to_pylist()
    return ListingPlan(found, private.table("archives", KNOWN), private.keys, excludes, options.rescan, unusable)


def _dry_counts(listing: ListingPlan, nothing_known: bool) -> dict[str, int]:
    names = ("new", "excluded") if nothing_known else ("new", "changed", "unchanged", "excluded")
    return {name: listing.counts[name] for name in names}


def _batches(jobs: Iterator[ScanJob], options: IngestOptions) -> Iterator[list[ArchiveScan]]:
    """Scans of the planned archives, in their order, a batch at a time."""
    if options.cluster is not None:
        with contextlib.closing(scans_in_order(jobs, options.cluster)) as scans:
            while scanned := list(itertools.islice(scans, options.batch)):
                yield scanned
        return
    pool: ProcessPoolExecutor | None = None
    try:
        while batch := list(itertools.islice(jobs, options.batch)):
            if pool is None and (options.workers < 2 or len(batch) < 2):
                yield [scan_archive(*job) for job in batch]
                continue
            pool = pool or _pool(min(options.workers, len(batch)))
            scanned, lost = _scan_in_pool(pool, batch)
            if lost:
                pool.shutdown()
                pool = None
            yield scanned
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: the parent has threads (Arrow's, the lease's), and a forked child may hang on their locks.
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _scan_in_pool(pool: ProcessPoolExecutor, jobs: Sequence[ScanJob]) -> tuple[list[ArchiveScan], bool]:
    """Scans of a batch, and whether the pool was lost: a worker that dies takes only the archive that killed it."""
    scans: list[ArchiveScan] = []
    lost = False
    futures = [_submit(pool, job) for job in jobs]
    for job, future in zip(jobs, futures, strict=True):
        try:
            if future is None:
                raise BrokenProcessPool
            scans.append(future.result())
        except BrokenProcessPool:
            lost = True
            scans.append(_scan_alone(job))
    return scans, lost


def _submit(pool: ProcessPoolExecutor, job: ScanJob) -> Future[ArchiveScan] | None:
    """The job's future, or None where an earlier job has already broken the pool."""
    try:
        return pool.submit(scan_archive, *job)
    except BrokenProcessPool:
        return None


def _scan_alone(job: ScanJob) -> ArchiveScan:
    with _pool(1) as pool:
        try:
            return pool.submit(scan_archive, *job).result()
        except BrokenProcessPool:
            return ArchiveScan(job[0], reason=CRASHED)
