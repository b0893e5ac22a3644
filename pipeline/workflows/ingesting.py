"""Read a dataset's headers into a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.engines import EngineOptions
    from pipeline.ingest import IngestOptions, IngestSummary


@dataclass(frozen=True)
class IngestJob:
    """A dataset, the store it goes to, and the user's own decisions about both.

    Attributes:
        dataset: Folder, zip or ``s3://`` URL of the archive.
        store: Where the store is or will be.
        options: What is read and how; overrides, cluster and excluded folders are filled in from this job.
        private: URL of the private part, if not ``STORE/private``.
        pairs: CSV with columns ``thick`` and ``thin``.
        splits: CSV with columns ``patient`` and ``split``.
        exclude: CSV with any of ``archive``, ``patient``, ``study`` and ``series``.
        engine: Distributes reading over a cluster, where one is named.
        seed: Seed of the splits of a new store.
    """

    dataset: str
    store: str
    options: IngestOptions
    private: str | None = None
    pairs: Path | None = None
    splits: Path | None = None
    exclude: Path | None = None
    engine: EngineOptions | None = None
    seed: int = 0


def ingest_dataset(job: IngestJob, on_archive: Callable[[int, int], None] = lambda done, total: None) -> IngestSummary:
    """Open or make the store, and read every archive that is new or has changed.

    Args:
        job: What is read, and where to.
        on_archive: Called with the number of archives done and in all.
    """
    from dataclasses import replace

    from latentcache import LatentStore
    from latentcache.storage import FILE_SCHEME, local_path
    from pipeline.identity import Keys
    from pipeline.ingest import ingest, open_stores, read_overrides

    opened, hidden = None, None
    if not job.options.dry_run or LatentStore.exists(job.store):
        opened, hidden = open_stores(job.store, job.private, job.seed)
    keys = hidden.keys if hidden is not None else Keys(b"a dry run without a store")
    folders = tuple(
        local_path(url) for url in (job.store, job.private) if url and ("://" not in url or url.startswith(FILE_SCHEME))
    )
    engine = job.engine
    on_cluster = engine is not None and (engine.name == "ray" or engine.scheduler is not None)
    options = replace(
        job.options,
        overrides=read_overrides(keys, job.pairs, job.splits, job.exclude),
        cluster=engine if on_cluster else None,
        exclude_folders=folders,
    )
    return ingest(job.dataset, opened, hidden, options, on_archive)
