"""Check every byte of a store, and on request its latents against the archives that they were made from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentcache import LatentStore

FIGURES = ("latents", "fragments", "snapshots", "encodings", "bytes", "orphans")


@dataclass(frozen=True)
class VerifyJob:
    """Settings of a check of a store.

    Attributes:
        store: Path or URL of the store.
        snapshot: Check the latents of this snapshot; the last where None.
        threads: Threads that read and hash.
        sources: Make latents again from their archives and compare them.
        sample: With ``sources``: share of the series to compare, 0 to 1.
        retire: With ``sources``: take latents of another series out of the manifest.
        vae: With ``sources``: the VAE that encoded, ``tiny`` or a path.
        device: Device of the VAE.
        private: URL of the private part, if not ``STORE/private``.
    """

    store: str
    snapshot: int | None = None
    threads: int = 2
    sources: bool = False
    sample: float = 1.0
    retire: bool = False
    vae: str = "tiny"
    device: str = "cpu"
    private: str | None = None


def verify(job: VerifyJob, on_task: Callable[[int, int], None] = lambda done, planned: None) -> dict[str, Any]:
    """Check a store and the stores that models generated in it.

    Args:
        job: What is checked.
        on_task: Called with how many series are compared with their archives and how many will be.

    Returns:
        Counts of what was read, ``problems`` (store, subject and what is wrong), ``ok``, and with ``sources`` what
        comparing found.
    """
    from latentcache import LatentStore
    from latentcache.maintenance import verify as verify_store

    opened = LatentStore.open(job.store, job.snapshot)
    stores = {"": opened} | {f"generated/{n}": opened.generated(n) for n in opened.location.folders("generated")}
    problems: list[dict[str, str]] = []
    totals = dict.fromkeys(FIGURES, 0)
    for name, each in stores.items():
        found = verify_store(each, threads=job.threads)
        problems += [{"store": name, "subject": p.subject, "what": p.what} for p in found.problems]
        for figure in totals:
            totals[figure] += getattr(found, figure)
    facts: dict[str, Any] = {**totals, "ok": not problems, "problems": problems}
    if job.sources:
        compared = compare_sources(opened, job, on_task)
        facts |= compared
        facts["ok"] = facts["ok"] and not compared["foreign"]
    return facts


def compare_sources(store: LatentStore, job: VerifyJob, on_task: Callable[[int, int], None]) -> dict[str, Any]:
    """Compare latents with their archives, and retire those of another series on request."""
    from pipeline.encode import check_sources, retire_foreign
    from pipeline.identity import PrivateStore
    from pipeline.vae import load_vae

    pointer = PrivateStore.open(store.url, job.private).pointer
    vae = load_vae(job.vae, device=job.device)
    found = check_sources(store, pointer, vae, sample=job.sample, on_task=on_task)
    retired, reopened = retire_foreign(store, found) if job.retire else (0, 0)
    return {
        "compared": found.compared,
        "skipped": found.skipped,
        "unread": found.unread,
        "foreign": {f"{row.key} {row.role}": round(by, 4) for row, by in found.foreign.values()},
        "retired": retired,
        "pairs_reopened": reopened,
    }
