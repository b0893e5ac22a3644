"""Repair: latents whose bytes are damaged or gone leave the manifest, and are made anew from their archives.

A row is retired only when its archive is at hand and still what ingest found; every other stays, with the reason, since
most windows of a damaged latent can still be read. Older snapshots keep the rows. Where the new bytes are those that
were lost (the same kind of device and number of threads), they are put back under the old path too, so that a training
run that is pinned to an older snapshot reads on; where they are not, the run is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import pyarrow.compute as pc

from latentcache import (
    CtpipeError,
    InputError,
    LatentRecord,
    LatentRole,
    LatentStore,
    PairRecord,
    Writer,
    restore_latent,
)
from latentcache.maintenance import damaged_latents, pinned_snapshots
from latentcache.tables import load_snapshot, read_table
from pipeline.reading import check_series
from pipeline.volume import SeriesPointer

PROOF = "pixel_proof"
"""Name of the pixel proof in a pair's evidence."""


@dataclass(frozen=True)
class Damage:
    """Damaged latents of one encoding.

    Attributes:
        repairable: Rows to retire, because their archives are at hand.
        hopeless: Rows that stay, ``KEY ROLE`` to what is wrong and why it cannot be made anew.
        pinned: Names of the runs whose pinned snapshot holds a damaged row, each with how many.
    """

    repairable: tuple[LatentRecord, ...] = ()
    hopeless: dict[str, str] = field(default_factory=dict)
    pinned: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.repairable) + len(self.hopeless)

    def paths(self) -> pa.Table:
        """Return the table that `Writer.retire` takes."""
        return pa.table({"path": pa.array([row.path for row in self.repairable], pa.string())})


def find_damage(
    store: LatentStore,
    pointer: Callable[[str], SeriesPointer],
    encode_key: str,
    roles: Sequence[LatentRole],
    threads: int = 2,
) -> Damage:
    """Read every latent of an encoding, and of those that are damaged look for the archive.

    Args:
        pointer: Where a series is, by its key.
    """
    damaged = damaged_latents(store, encode_key, roles, threads=threads)
    pairs = {pair.pair_key: pair for pair in store.pairs()} if damaged else {}
    usable = {one.series_key for one in store.series() if one.status == "ok"} if damaged else set()
    repairable: list[LatentRecord] = []
    hopeless: dict[str, str] = {}
    for row, what in damaged.values():
        pair = pairs.get(row.key)
        keys = (pair.thin_key, pair.thick_key) if pair else (row.key,)
        try:
            if not set(keys) <= usable or (pair and pair.status != "ok"):
                raise InputError(
                    "the catalog no longer has its source", expected="a series that is ok", remedy="Ingest it again."
                )
            for key in keys:
                check_series(pointer(key))
            repairable.append(row)
        except InputError as error:
            hopeless[f"{row.key} {row.role}"] = f"{what}; it stays as it is: {error}"
    return Damage(tuple(repairable), hopeless, _pins_of(store, set(damaged)))


def restore_pinned(store: LatentStore, lost: Sequence[LatentRecord]) -> int:
    """Put bytes back under their old paths wherever the latent made anew is the same; returns how many were."""
    restored = 0
    for row in lost:
        made = store.find(row.key, row.role, row.encode_key)
        if made is not None and made.path != row.path and (made.sha256, made.shape) == (row.sha256, row.shape):
            restore_latent(store.location, row.path, made.path, row.shape)
            restored += 1
    return restored


def reopen_pairs(store: LatentStore, writer: Writer, keys: set[str]) -> int:
    """Let the pixel proof of pairs be made anew whose series turned out to be something else; returns how many."""
    fresh = [
        _unproved(pair)
        for pair in store.pairs()
        if {pair.pair_key, pair.thin_key, pair.thick_key} & keys and PROOF in pair.evidence
    ]
    if fresh:
        writer.append_catalog([], fresh)
    return len(fresh)


def _unproved(pair: PairRecord) -> PairRecord:
    """The row as pairing by headers left it."""
    evidence = json.loads(pair.evidence)
    refused = not evidence.pop(PROOF).get("ok", True)
    row = replace(pair, evidence=json.dumps(evidence, sort_keys=True))
    return replace(row, status="ok", reason="") if refused else row


def _pins_of(store: LatentStore, paths: set[str]) -> dict[str, int]:
    """Runs whose pinned snapshots name any of these paths."""
    found: dict[str, int] = {}
    if not paths:
        return found
    wanted = pa.array(sorted(paths), pa.string())
    for number, names in pinned_snapshots(store.location).items():
        try:
            table = read_table(store.location, load_snapshot(store.location, number), "manifest", ("path",))
        except CtpipeError:
            continue  # a pin of a snapshot that `forget` took: its run is told when it resumes
        hit = int(pc.sum(pc.is_in(table["path"], value_set=wanted)).as_py() or 0)
        found.update(dict.fromkeys(names, hit) if hit else {})
    return found
