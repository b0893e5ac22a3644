"""Migrate a store of an older format version to this one, in place; killed at any point it can be run again.

Version 1 had no ``compute_dtype`` and ``device_kind`` in the manifest: its encode keys could not tell latents of a GPU
(bfloat16) from those of a CPU (float32). The timings know on which device each was made.
Arrays are unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentcache import FORMAT_VERSION, STORE, Lease, StoreError
from latentcache.storage import Location
from latentcache.tables import (
    KINDS,
    SCHEMAS,
    Fragment,
    Kind,
    Snapshot,
    drop_snapshot,
    snapshot_numbers,
    snapshot_path,
    write_fragment,
)


def migrate(location: Location) -> tuple[int, int]:
    """Bring a store to this format version; returns (version found, fragments rewritten).

    The current snapshot is rewritten as the next one in the new format; then the older snapshots and their fragments
    go, since no reader of the new version could open them; then store.json changes version.

    Raises:
        StoreError: No store, a newer one, one with damaged fragments, or a driver is committing.
    """
    try:
        data = location.read(STORE)
    except FileNotFoundError:
        data = b""
    try:
        header = json.loads(data)
        found = int(header["format_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{location.url} has no readable {STORE}", expected="a store", remedy="Copy the store whole."
        ) from error
    if found > FORMAT_VERSION:
        raise StoreError(
            f"a store of format version {found}",
            expected=f"version {FORMAT_VERSION} or older",
            remedy="Update ctpipe: the store was written by a newer one.",
        )
    if found not in STEPS and found != FORMAT_VERSION:
        raise StoreError(
            f"a store of unknown format version {found}",
            expected=f"one of {sorted([*STEPS, FORMAT_VERSION])}",
            remedy="Make the store again with `ctpipe ingest` and `ctpipe encode`.",
        )
    if found == FORMAT_VERSION:
        return found, 0
    # Generated stores first and store.json last: while it shows the old version, there is work left to do.
    rewritten = sum(migrate(location.child(f"generated/{name}"))[1] for name in location.folders("generated"))
    lease = Lease(location)
    lease.acquire()
    try:
        rewritten += STEPS[found](location)
        _drop_older(location)
        header["format_version"] = FORMAT_VERSION
        location.put(STORE, json.dumps(header, indent=1).encode())
    finally:
        lease.release()
    return found, rewritten


def _from_older(location: Location) -> int:
    number = snapshot_numbers(location)[-1]
    body: dict[str, Any] = json.loads(location.read(snapshot_path(number)))
    if body["format_version"] == FORMAT_VERSION:
        return 0  # an earlier run was killed after this step
    lists: dict[Kind, tuple[Fragment, ...]] = {}
    count = 0
    made_on = _made_on(location, body["fragments"])
    for kind in KINDS:
        parts = []
        for entry in body["fragments"].get(kind, []):
            parts.append(write_fragment(location, kind, _upgraded(location, kind, Fragment(**entry), made_on)))
            count += 1
        lists[kind] = tuple(parts)
    snapshot = Snapshot(number + 1, lists)
    location.put_once(snapshot_path(snapshot.number), [snapshot.to_json()])
    return count


def _made_on(location: Location, fragments: dict[str, list[dict[str, Any]]]) -> dict[tuple[str, str], set[str]]:
    """Kinds of device, ``cpu`` or ``cuda``, by encode key and key of a latent, as far as the timings tell.

    A timing bears its task's key: the pair's, for the latents of both its series too.
    """
    series: dict[str, list[str]] = {}
    for row in _rows(location, fragments.get("pairs", []), ["pair_key", "thin_key", "thick_key"]):
        series[row["pair_key"]] = [row["thin_key"], row["thick_key"]]
    found: dict[tuple[str, str], set[str]] = {}
    for row in _rows(location, fragments.get("timings", []), ["encode_key", "key", "device"]):
        for key in (row["key"], *series.get(row["key"], ())):
            found.setdefault((row["encode_key"], key), set()).add(row["device"])
    return found


def _rows(location: Location, entries: list[dict[str, Any]], columns: list[str]) -> Iterator[dict[str, Any]]:
    for entry in entries:
        data = pa.BufferReader(location.read(Fragment(**entry).path))
        yield from pq.read_table(data, columns=columns).to_pylist()


def _numerics(table: pa.Table, made_on: Mapping[tuple[str, str], set[str]]) -> pa.Table:
    """A manifest table of an older version with the two columns that say what its latents were computed in and on.

    On a GPU that was bfloat16, on a CPU float32. Where both kinds have worked at a latent, it is unknown which of them
    was first.
    """
    known = {"cuda": ("bfloat16", "cuda"), "cpu": ("float32", "cpu")}
    found = []
    for row in zip(table["encode_key"].to_pylist(), table["key"].to_pylist(), strict=True):
        kinds = made_on.get(row, set()) & known.keys() or {"cpu"}
        found.append(known[min(kinds)] if len(kinds) == 1 else ("unknown", "unknown"))
    for at, name in enumerate(("compute_dtype", "device_kind")):
        table = table.append_column(name, pa.array([values[at] for values in found], pa.string()))
    return table


def _upgraded(
    location: Location, kind: Kind, fragment: Fragment, made_on: Mapping[tuple[str, str], set[str]]
) -> pa.Table:
    table = pq.read_table(pa.BufferReader(location.read(fragment.path)))
    if table.num_rows != fragment.rows:
        raise StoreError(
            f"{fragment.path} has {table.num_rows} rows",
            expected=f"{fragment.rows}",
            remedy="Restore it from a copy of the store before migrating.",
        )
    if kind == "manifest" and "compute_dtype" not in table.column_names:
        table = _numerics(table, made_on)
    schema = SCHEMAS[kind]
    return table.select(schema.names).cast(schema)


def _drop_older(location: Location) -> None:
    numbers = snapshot_numbers(location)
    for number in numbers[:-1]:
        drop_snapshot(location, number)
    kept = Snapshot.from_json(location.read(snapshot_path(numbers[-1])), snapshot_path(numbers[-1]))
    named = {f.path for kind in KINDS for f in kept.fragments[kind]}
    for kind in KINDS:
        for entry in list(location.list(kind)):
            if entry.path not in named:
                location.delete(entry.path)


STEPS: dict[int, Callable[[Location], int]] = {1: _from_older}
"""From version n to this one."""
