"""Forget: take rows, and every byte made from them, out of every version of a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentcache import LatentStore, StoreError
from latentcache.storage import Location
from latentcache.tables import (
    KINDS,
    Fragment,
    Kind,
    Snapshot,
    drop_snapshot,
    load_snapshot,
    read_fragment,
    read_table,
    snapshot_numbers,
    write_fragment,
)

Keep = Callable[[Kind, pa.Table], pa.Array]
"""Function that returns the rows of a table that stay, as a boolean mask."""


@dataclass(frozen=True)
class Forgotten:
    """Counts of what was removed."""

    series: int = 0
    pairs: int = 0
    latents: int = 0
    objects: int = 0
    generated_latents: int = 0


def keys_of_patient(store: LatentStore, patient_key: str) -> set[str]:
    """Series and pair keys of a patient in any snapshot that the store still keeps."""
    keys: set[str] = set()
    names: dict[Kind, str] = {"catalog": "series_key", "pairs": "pair_key"}
    fragments = {
        f.path: (kind, f)
        for number in snapshot_numbers(store.location)
        for kind in names
        for f in load_snapshot(store.location, number).fragments[kind]
    }
    for kind, fragment in fragments.values():
        table = read_fragment(store.location, kind, fragment, ("patient_key", names[kind]))
        own = table.filter(pc.equal(table.column("patient_key"), patient_key))
        keys.update(own.column(names[kind]).to_pylist())
    return keys


def forget_patient(store: LatentStore, patient_key: str) -> Forgotten:
    """Remove one patient: rows, latents, generated latents, and every older snapshot and fragment that named them.

    Repeating it is harmless; repeating it after it was interrupted completes it. PRIVATE is not this module's.

    Raises:
        StoreError: A driver is committing, or the store object is pinned.
    """
    with store.writer():
        pass  # refuse early, before any generated store is touched
    keys = keys_of_patient(store, patient_key)
    generated = sum(remove_keys(child, keys).latents for child in _generated(store)) if keys else 0
    done = remove_keys(store, keys)
    return Forgotten(done.series, done.pairs, done.latents, done.objects, generated)


def _generated(store: LatentStore) -> list[LatentStore]:
    found = []
    for name in store.location.folders("generated"):
        try:
            found.append(store.generated(name))
        except StoreError:
            continue  # its creation was cut short; it holds no latent
    return found


def remove_keys(store: LatentStore, keys: set[str]) -> Forgotten:
    """Remove all rows of these series and pair keys, their arrays, and all history.

    First a snapshot without the rows becomes current, then bytes go, then the older snapshots: an interruption at any
    point leaves a sound store and enough to find the rest when it is run again.
    """
    wanted = pa.array(sorted(keys), pa.string())

    def keep(kind: Kind, table: pa.Table) -> pa.Array:
        names = {"catalog": ("series_key",), "pairs": ("pair_key", "thick_key", "thin_key")}.get(kind, ("key",))
        hit = pa.chunked_array([np.zeros(table.num_rows, bool)])
        for name in names:
            hit = pc.or_(hit, pc.is_in(table.column(name), value_set=wanted))
        return pc.invert(hit)

    location = store.location
    with store.writer() as writer:
        before = store.current_snapshot
        # Also where no row goes: a driver that lost the lease while it slept must find its number taken (see gc).
        after = writer.replace(lambda base: rewrite(location, base, keep))
        removed = {kind: before.rows(kind) - after.rows(kind) for kind in KINDS}
        objects = _delete_arrays(location, keys) + _delete_history(location, store.current_snapshot)
    return Forgotten(removed["catalog"], removed["pairs"], removed["manifest"], objects)


def rewrite(location: Location, base: Snapshot, keep: Keep) -> Snapshot:
    """The next snapshot, with only the rows to keep, each table in one fragment. Not yet committed."""
    lists: dict[Kind, tuple[Fragment, ...]] = {}
    for kind in KINDS:
        table = read_table(location, base, kind)
        table = table.filter(keep(kind, table))
        lists[kind] = (write_fragment(location, kind, table),) if table.num_rows else ()
    return Snapshot(base.number + 1, lists)


def _delete_arrays(location: Location, keys: set[str]) -> int:
    """Every array of these keys, attempts that were never committed included."""
    count = 0
    for encode_key in location.folders("latents.zarr"):
        for key in sorted(keys):
            for entry in list(location.list(f"latents.zarr/{encode_key}/{key}")):
                location.delete(entry.path)
                count += 1
    return count


def _delete_history(location: Location, current: Snapshot) -> int:
    """Older snapshots, then every fragment that the current one does not name. The lease is held: none is new."""
    count = 0
    for number in snapshot_numbers(location):
        if number != current.number:
            drop_snapshot(location, number)
            count += 1
    named = {f.path for kind in KINDS for f in current.fragments[kind]}
    for kind in KINDS:
        for entry in list(location.list(kind)):
            if entry.path not in named:
                location.delete(entry.path)
                count += 1
    return count
