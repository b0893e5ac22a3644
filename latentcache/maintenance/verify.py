"""Verify: every byte that a snapshot names against its checksums, and every row against its array, both ways."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentcache import (
    LATENT_ROLES,
    METADATA,
    SHARD,
    CtpipeError,
    LatentRecord,
    LatentRole,
    LatentStore,
    Layout,
    Moments,
    valid_latents,
)
from latentcache.maintenance.gc import attempts_in
from latentcache.tables import (
    KINDS,
    Fragment,
    Kind,
    from_table,
    load_snapshot,
    read_fragment,
    snapshot_numbers,
    snapshot_path,
)

AT_ONCE = 4096
"""Rows turned into Python objects together."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was committed. ``subject`` is a key or a path inside the store."""

    subject: str
    what: str


@dataclass
class Verification:
    """Counts of what was looked at, and faults. Orphans are garbage that gc will take, not a fault."""

    snapshots: int = 0
    fragments: int = 0
    encodings: int = 0
    latents: int = 0
    bytes: int = 0
    orphans: int = 0
    problems: list[Problem] = field(default_factory=list)
    damaged: list[LatentRecord] = field(default_factory=list)
    """Rows whose bytes are gone, changed or unlike the row: what `ctpipe encode --repair` makes anew."""

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(store: LatentStore, *, threads: int = 2) -> Verification:
    """Read the whole store once. Memory is bounded by the manifest and one latent a thread."""
    result = Verification()
    _verify_tables(store, result)
    _verify_encodings(store, result)
    try:
        manifest = store.manifest_table()
        catalogued = _catalogued(store)
    except CtpipeError:
        return result  # the damaged fragment is already among the problems
    encodings = set(store.encode_keys())
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, manifest.num_rows, AT_ONCE):
            rows = from_table(manifest.slice(first, AT_ONCE), LatentRecord)
            found = pool.map(lambda r: list(verify_latent(store, r, encodings)), rows)
            for row, problems in zip(rows, found, strict=True):
                result.latents += 1
                result.bytes += Layout(row.shape).shard_bytes
                result.problems += problems
                result.damaged += [row] if problems else []
                if catalogued and row.key not in catalogued:
                    result.problems.append(Problem(row.key, f"{row.role} is in the manifest but not in the catalog"))
    named = set(manifest["path"].to_pylist())
    result.orphans = sum(path not in named for path, _ in attempts_in(store.location))
    return result


def damaged_latents(
    store: LatentStore, encode_key: str, roles: Sequence[LatentRole] = LATENT_ROLES, *, threads: int = 2
) -> dict[str, tuple[LatentRecord, str]]:
    """Rows of an encoding whose bytes are gone, changed or unlike the row, by path, each with what is wrong."""
    wanted = pa.array(roles, pa.string())
    table = store.manifest_table(
        None, lambda rows: pc.and_(pc.equal(rows["encode_key"], encode_key), pc.is_in(rows["role"], value_set=wanted))
    )
    found: dict[str, tuple[LatentRecord, str]] = {}
    with ThreadPoolExecutor(threads) as pool:
        for first in range(0, table.num_rows, AT_ONCE):
            rows = from_table(table.slice(first, AT_ONCE), LatentRecord)
            checked = pool.map(lambda row: next(verify_latent(store, row, {encode_key}), None), rows)
            found.update((row.path, (row, bad.what)) for row, bad in zip(rows, checked, strict=True) if bad)
    return found


def _catalogued(store: LatentStore) -> set[str]:
    """Keys of the catalog and pairs; empty for a store of generated latents, which has no catalog."""
    series = store.catalog_table(("series_key",)).column("series_key").to_pylist()
    pairs = store.pairs_table(("pair_key",)).column("pair_key").to_pylist()
    return {*series, *pairs} if series else set()


def _verify_tables(store: LatentStore, result: Verification) -> None:
    """Every snapshot's seal, and every fragment that any of them lists."""
    location = store.location
    fragments: dict[str, tuple[Kind, Fragment]] = {}
    for number in snapshot_numbers(location):
        try:
            snapshot = load_snapshot(location, number)
        except CtpipeError as error:
            result.problems.append(Problem(snapshot_path(number), str(error)))
            continue
        result.snapshots += 1
        fragments |= {f.path: (kind, f) for kind in KINDS for f in snapshot.fragments[kind]}
    for path, (kind, fragment) in fragments.items():
        try:
            table = read_fragment(location, kind, fragment)
        except CtpipeError as error:
            result.problems.append(Problem(path, str(error)))
            continue
        result.fragments += 1
        result.bytes += fragment.size
        if table.num_rows != fragment.rows:
            result.problems.append(Problem(path, f"{table.num_rows} rows where the snapshot says {fragment.rows}"))


def _verify_encodings(store: LatentStore, result: Verification) -> None:
    for encode_key in store.encode_keys():
        try:
            store.encoding(encode_key)
            result.encodings += 1
        except (CtpipeError, ValueError, TypeError, KeyError) as error:
            result.problems.append(Problem(f"encodings/{encode_key}.json", f"cannot be read: {type(error).__name__}"))


def verify_latent(store: LatentStore, row: LatentRecord, encodings: set[str]) -> Iterator[Problem]:
    """Everything that a manifest row says, against the bytes."""
    subject = f"{row.key} {row.role}"
    layout = Layout(row.shape)
    try:
        metadata = store.location.read(f"{row.path}/{METADATA}")
        shard = store.location.read(f"{row.path}/{SHARD}")
    except FileNotFoundError:
        yield Problem(subject, "its array is missing")
        return
    if metadata != layout.metadata():
        yield Problem(subject, f"{METADATA} is not the one of a {row.dtype} array of shape {row.shape}")
    if len(shard) != layout.shard_bytes:
        yield Problem(subject, f"{len(shard)} bytes where {layout.shard_bytes} were written")
        return
    if hashlib.sha256(shard).hexdigest() != row.sha256:
        yield Problem(subject, "SHA-256 differs from the manifest's")
    if row.encode_key not in encodings:
        yield Problem(subject, f"its encoding {row.encode_key} is not registered")
    try:
        array = store.read(row)
    except CtpipeError as error:
        yield Problem(subject, str(error))
        return
    if not np.isfinite(array).all():
        yield Problem(subject, "holds NaN or infinite values")
        return
    d, h, w = valid_latents(row.valid_zyx)
    if any(n > have for n, have in zip((d, h, w), row.shape[1:], strict=True)):
        yield Problem(subject, f"valid_zyx {row.valid_zyx} is larger than the latent {row.shape}")
        return
    moments = Moments.of(array[:, :d, :h, :w])
    if not (np.allclose(moments.mean, row.mean, rtol=1e-6, atol=1e-9) and np.allclose(moments.std, row.std, rtol=1e-6)):
        yield Problem(subject, "mean or std differ from the manifest's")
