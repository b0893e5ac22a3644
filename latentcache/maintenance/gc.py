"""Garbage: attempts that no row names, fragments that no snapshot names, and files left aside by killed writers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from latentcache import LatentStore, StoreError, Writer
from latentcache.maintenance.pins import EXPIRING, mark_path, pinned_snapshots
from latentcache.storage import TEMPORARY, Entry, Location
from latentcache.tables import (
    KINDS,
    Snapshot,
    drop_snapshot,
    load_snapshot,
    read_fragment,
    snapshot_numbers,
    snapshot_path,
)

GRACE_S = 24 * 3600.0
ARRAYS = "latents.zarr"


@dataclass(frozen=True)
class Garbage:
    """Counts of what was (or, in a dry run, would be) removed."""

    attempts: int = 0
    fragments: int = 0
    asides: int = 0
    snapshots: int = 0
    objects: int = 0
    bytes: int = 0

    def __add__(self, other: Garbage) -> Garbage:
        return Garbage(*(a + b for a, b in zip(self.as_tuple(), other.as_tuple(), strict=True)))

    def as_tuple(self) -> tuple[int, ...]:
        return (self.attempts, self.fragments, self.asides, self.snapshots, self.objects, self.bytes)


def collect(
    store: LatentStore, *, grace_s: float = GRACE_S, dry_run: bool = False, expire_snapshots: bool = False
) -> Garbage:
    """Remove what nothing names and nobody can still be writing; generated stores included.

    Spared are: everything that any snapshot names, and every attempt of which any object is younger than ``grace_s``
    seconds, because a worker may be about to hand it in.

    Args:
        expire_snapshots: First drop snapshots that are older than the grace time, not current and not pinned.

    Raises:
        StoreError: A driver is committing. gc holds the lease, so that no attempt is committed while it looks.
    """
    with store.writer() as writer:
        total = _collect(store, writer, grace_s, dry_run, expire_snapshots)
    for name in store.location.folders("generated"):
        try:
            child = store.generated(name)
        except StoreError:
            continue  # its creation was cut short: repeated by the next sampling run
        total += collect(child, grace_s=grace_s, dry_run=dry_run, expire_snapshots=expire_snapshots)
    return total


@dataclass(frozen=True)
class _Found:
    """Objects to remove, by why."""

    snapshots: list[Entry]
    fragments: list[Entry]
    attempts: list[list[Entry]]
    asides: list[Entry]

    @property
    def rest(self) -> list[Entry]:
        """All but the snapshots, which go first."""
        return [*self.fragments, *(e for group in self.attempts for e in group), *self.asides]


def _collect(store: LatentStore, writer: Writer, grace_s: float, dry_run: bool, expire_snapshots: bool) -> Garbage:
    location, base = store.location, store.current_snapshot
    oldest = time.time() - grace_s
    doomed = _expired(location, oldest, base) if expire_snapshots else []
    if doomed and not dry_run:
        for entry in doomed:
            location.put(mark_path(_number(entry)), b"{}")
        # A run may have pinned one since; from now on none can, see pins.pin.
        pinned = set(pinned_snapshots(location))
        doomed = [entry for entry in doomed if _number(entry) not in pinned]
    found = _garbage(location, oldest, doomed, base)
    if not dry_run:
        if doomed or found.rest:
            # A driver that lost the lease while it slept may hold a fragment that is about to go, with nothing but a
            # put between it and a snapshot that names it. This takes the number that it would put.
            writer.replace(lambda base: Snapshot(base.number + 1, base.fragments))
        for entry in doomed:
            drop_snapshot(location, _number(entry))
        for entry in (*list(location.list(EXPIRING)), *found.rest):
            location.delete(entry.path)
    objects = [*doomed, *found.rest]
    return Garbage(
        len(found.attempts),
        len(found.fragments),
        len(found.asides),
        len(doomed),
        len(objects),
        sum(entry.size for entry in objects),
    )


def _garbage(location: Location, oldest: float, doomed: list[Entry], base: Snapshot) -> _Found:
    """Return what no snapshot names but the doomed; ``base`` counts also where a listing does not show it yet."""
    gone = {e.path for e in doomed}
    numbers = [n for n in snapshot_numbers(location) if snapshot_path(n) not in gone and n != base.number]
    paths, attempts = named(location, [base, *(load_snapshot(location, n) for n in numbers)])
    fragments = [
        e
        for kind in KINDS
        for e in location.list(kind)
        if e.path not in paths and e.modified < oldest and not is_aside(e)
    ]
    dead = [group for path, group in attempts_in(location) if path not in attempts and _all_older(group, oldest)]
    known = {e.path for group in dead for e in group}
    asides = [e for e in _asides(location) if e.modified < oldest and e.path not in known]
    return _Found(doomed, fragments, dead, asides)


def _number(entry: Entry) -> int:
    """The number of the snapshot whose file this is."""
    return int(entry.path.rpartition("/")[2].removesuffix(".json"))


def _asides(location: Location) -> Iterator[Entry]:
    """Files left aside anywhere in the store itself (not in generated stores, nor in PRIVATE)."""
    yield from (e for e in location.objects("") if is_aside(e))
    for folder in (*KINDS, "snapshots", "encodings", "pins", EXPIRING, ARRAYS):
        yield from (e for e in location.list(folder) if is_aside(e))


def is_aside(entry: Entry) -> bool:
    """A file that was being written when its writer died."""
    return entry.path.rsplit("/", 1)[-1].startswith(TEMPORARY)


def _all_older(group: Iterable[Entry], oldest: float) -> bool:
    return all(e.modified < oldest for e in group)


def _expired(location: Location, oldest: float, base: Snapshot) -> list[Entry]:
    numbers = snapshot_numbers(location)
    kept = {snapshot_path(n) for n in (*pinned_snapshots(location), *numbers[-1:], base.number)}
    named = {snapshot_path(n) for n in numbers}
    return [e for e in location.list("snapshots") if e.path in named - kept and e.modified < oldest]


def named(location: Location, snapshots: Iterable[Snapshot]) -> tuple[set[str], set[str]]:
    """Paths of all fragments, and of all attempts, that any of the snapshots names; each fragment is read once."""
    fragments = {f.path: (kind, f) for s in snapshots for kind in KINDS for f in s.fragments[kind]}
    attempts: set[str] = set()
    for kind, fragment in fragments.values():
        if kind == "manifest":
            attempts.update(read_fragment(location, kind, fragment, ("path",)).column("path").to_pylist())
    return set(fragments), attempts


def attempts_in(location: Location) -> Iterator[tuple[str, list[Entry]]]:
    """Every attempt below latents.zarr with its objects. An aside file directly in a folder above counts as none."""

    def attempt(entry: Entry) -> str:
        return entry.path.rpartition("/")[0]

    for path, group in groupby(sorted(location.list(ARRAYS), key=attempt), key=attempt):
        yield path, list(group)
