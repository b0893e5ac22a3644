"""Migrate a store of an older format version to this one, in place; killed at any point it can be run again.

Version 0, the format before the first release, had no ``status`` and ``reason`` in the pairs table (a pair that the
pixels contradict could not be told) and no ``stage`` in the timings. Arrays are unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentcache import FORMAT_VERSION, STORE, Lease, StoreError
from latentcache.storage import Location
from latentcache.tables import KINDS, SCHEMAS, Fragment, Kind, Snapshot, snapshot_numbers, snapshot_path, write_fragment

DEFAULTS_OF_0: dict[Kind, dict[str, str]] = {"pairs": {"status": "ok", "reason": ""}, "timings": {"stage": ""}}


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


def _from_0(location: Location) -> int:
    number = snapshot_numbers(location)[-1]
    body: dict[str, Any] = json.loads(location.read(snapshot_path(number)))
    if body["format_version"] == FORMAT_VERSION:
        return 0  # an earlier run was killed after this step
    lists: dict[Kind, tuple[Fragment, ...]] = {}
    count = 0
    for kind in KINDS:
        parts = []
        for entry in body["fragments"].get(kind, []):
            parts.append(write_fragment(location, kind, _upgraded(location, kind, Fragment(**entry))))
            count += 1
        lists[kind] = tuple(parts)
    snapshot = Snapshot(number + 1, lists)
    location.put_once(snapshot_path(snapshot.number), [snapshot.to_json()])
    return count


def _upgraded(location: Location, kind: Kind, fragment: Fragment) -> pa.Table:
    table = pq.read_table(pa.BufferReader(location.read(fragment.path)))
    if table.num_rows != fragment.rows:
        raise StoreError(
            f"{fragment.path} has {table.num_rows} rows",
            expected=f"{fragment.rows}",
            remedy="Restore it from a copy of the store before migrating.",
        )
    schema = SCHEMAS[kind]
    defaults = DEFAULTS_OF_0.get(kind, {})
    columns = [
        table.column(name) if name in table.column_names else pa.array([defaults[name]] * table.num_rows, pa.string())
        for name in schema.names
    ]
    return pa.table(columns, names=schema.names).cast(schema)


def _drop_older(location: Location) -> None:
    numbers = snapshot_numbers(location)
    for number in numbers[:-1]:
        location.delete(snapshot_path(number))
    kept = Snapshot.from_json(location.read(snapshot_path(numbers[-1])), snapshot_path(numbers[-1]))
    named = {f.path for kind in KINDS for f in kept.fragments[kind]}
    for kind in KINDS:
        for entry in list(location.list(kind)):
            if entry.path not in named:
                location.delete(entry.path)


STEPS: dict[int, Callable[[Location], int]] = {0: _from_0}
"""From version n to n + 1."""
