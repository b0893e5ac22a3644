"""LatentStore: one directory, or one prefix of an object store, that goes through every command."""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentcache.checks import check_key, load_encoding, validate_latent
from latentcache.errors import InputError, StoreError, StoreExistsError
from latentcache.moments import ROW, Moments, moments_of
from latentcache.records import (
    FORMAT_VERSION,
    Encoding,
    LatentMeta,
    LatentPlace,
    LatentRecord,
    LatentRole,
    PairRecord,
    SeriesRecord,
    Split,
    valid_latents,
)
from latentcache.shard import Latent, read_latent, write_latent
from latentcache.storage import Location, open_location
from latentcache.tables import (
    Keep,
    Kind,
    RowFinder,
    Snapshot,
    check_version,
    distinct,
    from_table,
    load_snapshot,
    read_table,
    snapshot_path,
)
from latentcache.writer import Writer

if TYPE_CHECKING:
    import zarr

STORE = "store.json"


@dataclass(frozen=True)
class Header:
    """Facts of a store that never change: whose secret made its keys, and the seed of its splits."""

    secret_fingerprint: str
    split_seed: int

    @classmethod
    def read(cls, location: Location) -> Header:
        """Raises StoreError: no store, an unreadable header, or another format version."""
        try:
            data = location.read(STORE)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"there is no store at {location.url}",
                expected=f"a folder or prefix with {STORE}",
                remedy="Make one with `ctpipe ingest DATASET STORE`; if this is a copy, copy it whole.",
            ) from error
        except OSError as error:
            raise _unreadable() from error
        try:
            body = json.loads(data)
            version = body["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable() from error
        check_version(version)
        try:
            return cls(body["secret_fingerprint"], body["split_seed"])
        except KeyError as error:
            raise _unreadable() from error

    def create(self, location: Location) -> Snapshot:
        """Make an empty store; returns its first snapshot.

        Raises:
            StoreError: There is one already.
        """
        body = {
            "format_version": FORMAT_VERSION,
            "secret_fingerprint": self.secret_fingerprint,
            "split_seed": self.split_seed,
        }
        empty = Snapshot(0)
        # store.json comes last: a store that has one is whole, and a creation that was killed can be repeated.
        try:
            location.put_once(snapshot_path(0), [empty.to_json()])
        except FileExistsError:
            load_snapshot(location, 0)
        try:
            location.put_once(STORE, [json.dumps(body, indent=1).encode()])
        except FileExistsError as error:
            raise StoreExistsError(
                f"there is a store at {location.url} already",
                expected="a place without one",
                remedy="Open it, or choose another place.",
            ) from error
        return empty


def _unreadable() -> StoreError:
    return StoreError(
        f"{STORE} cannot be read",
        expected="a JSON object with format_version, secret_fingerprint and split_seed",
        remedy="Restore it from a copy of the store.",
    )


def is_store(location: Location) -> bool:
    """Whether there is a store, of whatever version."""
    try:
        location.size(STORE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def open_on_worker(url: str, fingerprint: str) -> LatentStore:
    """The driver's store, opened on a worker; ``fingerprint`` is that of the secret that made the driver's keys.

    Raises:
        InputError: There is no store at this URL, or another one.
    """
    try:
        store = LatentStore.open(url)
    except InputError as error:
        raise InputError(
            f"a worker does not see the store {url}",
            expected="the same store at the same URL on every node",
            remedy=f"Mount it there, or use s3://. On the worker: {error.found}.",
        ) from error
    if store.secret_fingerprint != fingerprint:
        raise InputError(
            f"a worker sees another store at {url}",
            expected=f"the driver's store, secret fingerprint {fingerprint}",
            remedy=f"The worker's has {store.secret_fingerprint}: mount the same volume on every node.",
        )
    return store


@functools.lru_cache(maxsize=16)
def store_of_worker(url: str) -> LatentStore:
    """Return this process's own handle of a store, opened once. Rows come with a task: its snapshot does not matter."""
    return LatentStore.open(url)


def training_moments(store: LatentStore, encode_key: str) -> Moments:
    """Per-channel moments over the training split's thin latents under an encode key; they serve all roles.

    Raises:
        InputError: There are none.
    """

    def thin(rows: pa.Table) -> pa.ChunkedArray:
        return pc.and_(pc.equal(rows["encode_key"], encode_key), pc.equal(rows["role"], "thin"))

    return moments_of(store.manifest_table(ROW, thin), store.catalog_table(("series_key", "split")), encode_key)


class LatentStore:
    """A store at one snapshot. Readers never see it change unless they call ``refresh`` or write through it."""

    def __init__(self, location: Location, header: Header, snapshot: Snapshot, pinned: bool = False) -> None:
        self.location = location
        self.header = header
        self._snapshot = snapshot
        self._pinned = pinned
        self._tables: dict[Kind, pa.Table] = {}
        self._finder: RowFinder | None = None
        self._checked: set[str] = set()
        self._encodings: dict[str, Encoding] = {}
        self._writer: Writer | None = None

    @classmethod
    def create(cls, place: str | Path | Location, *, secret_fingerprint: str, split_seed: int = 0) -> LatentStore:
        """Make an empty store at a URL or location.

        Raises:
            StoreError: There is one already.
        """
        location, header = open_location(place), Header(secret_fingerprint, int(split_seed))
        return cls(location, header, header.create(location))

    @classmethod
    def open(cls, place: str | Path | Location, snapshot: int | None = None) -> LatentStore:
        """Open a store at its current snapshot, or pinned at a given one.

        Raises:
            StoreError: No store, a newer or older format, a damaged or partial copy, or no such snapshot.
        """
        location = open_location(place)
        header = Header.read(location)
        return cls(location, header, load_snapshot(location, snapshot), pinned=snapshot is not None)

    @staticmethod
    def exists(place: str | Path | Location) -> bool:
        """Whether there is a store, of whatever version, at this place."""
        return is_store(open_location(place))

    def __reduce__(self) -> tuple[Any, ...]:
        """Workers get the store by its URL and snapshot."""
        return (LatentStore.open, (self.url, self.snapshot if self._pinned else None))

    @property
    def url(self) -> str:
        return self.location.url

    @property
    def secret_fingerprint(self) -> str:
        """Of the secret that made the store's keys."""
        return self.header.secret_fingerprint

    @property
    def split_seed(self) -> int:
        return self.header.split_seed

    @property
    def snapshot(self) -> int:
        """Number of the snapshot that this object shows."""
        return self._snapshot.number

    @property
    def current_snapshot(self) -> Snapshot:
        """The snapshot that this object shows, with its fragments."""
        return self._snapshot

    def refresh(self) -> int:
        """Move to the current snapshot, unless pinned; returns its number."""
        if not self._pinned:
            self.advance(load_snapshot(self.location))
        return self.snapshot

    def advance(self, snapshot: Snapshot) -> None:
        """Show a newer snapshot (the writer calls this after a commit)."""
        if snapshot.number != self._snapshot.number:
            self._snapshot, self._tables, self._finder = snapshot, {}, None

    # -- tables -------------------------------------------------------------------------------------------------------

    def table(self, kind: Kind, columns: Sequence[str] | None = None, keep: Keep | None = None) -> pa.Table:
        """Rows of a table in this snapshot. Few columns, or few rows, of a large manifest are read alone.

        Args:
            keep: Which rows, as a boolean mask over the columns that identify a row (schema.UNIQUE).
        """
        whole = self._tables.get(kind)
        if whole is not None:
            whole = whole if keep is None else whole.filter(keep(whole))
            return whole if columns is None else whole.select(list(columns))
        if columns is not None or keep is not None:
            return read_table(self.location, self._snapshot, kind, columns, keep, checked=self._checked)
        self._tables[kind] = read_table(self.location, self._snapshot, kind, checked=self._checked)
        return self._tables[kind]

    def catalog_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        return self.table("catalog", columns)

    def pairs_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        return self.table("pairs", columns)

    def manifest_table(self, columns: Sequence[str] | None = None, keep: Keep | None = None) -> pa.Table:
        return self.table("manifest", columns, keep)

    def encoded(self) -> list[tuple[str, LatentRole]]:
        """The (encode key, role) pairs of which there are latents, sorted."""
        rows = distinct(self.location, self._snapshot, "manifest", ("encode_key", "role"), self._checked).to_pylist()
        return sorted((row["encode_key"], row["role"]) for row in rows)

    def series(self) -> list[SeriesRecord]:
        return from_table(self.catalog_table(), SeriesRecord)

    def pairs(self) -> list[PairRecord]:
        return from_table(self.pairs_table(), PairRecord)

    def append_catalog(self, series: Sequence[SeriesRecord], pairs: Sequence[PairRecord] = ()) -> None:
        """Add or replace catalog and pair rows in one snapshot. Driver only; takes the lease."""
        if self._writer is not None:
            self._writer.append_catalog(series, pairs)
            return
        with self.writer() as writer:
            writer.append_catalog(series, pairs)

    # -- encodings ----------------------------------------------------------------------------------------------------

    def register_encoding(self, encoding: Encoding) -> str:
        """Keep an encoding in clear under its key; repeating it is harmless."""
        key = encoding.encode_key
        try:
            self.location.put_once(f"encodings/{key}.json", [encoding.to_json().encode()])
        except FileExistsError:
            self.encoding(key)
        return key

    def encoding(self, encode_key: str) -> Encoding:
        """Raises StoreError if the store has no such encoding, or its file is damaged."""
        if encode_key not in self._encodings:  # it never changes: read once, not with every latent
            self._encodings[encode_key] = load_encoding(self.location, encode_key)
        return self._encodings[encode_key]

    def encode_keys(self) -> list[str]:
        """Keys of all registered encodings."""
        return sorted(e.path.split("/")[-1][:-5] for e in self.location.list("encodings") if e.path.endswith(".json"))

    def encoding_in_use(self, encode_key: str | None = None) -> Encoding:
        """Return the encoding asked for, else the only one there; those of mirrored volumes are for training alone.

        Raises:
            InputError: None, several, or another than asked for.
        """
        keys = [key for key in self.encode_keys() if not self.encoding(key).mirrored]
        if encode_key in keys or (encode_key is None and len(keys) == 1):
            return self.encoding(encode_key or keys[0])
        raise InputError(
            f"encodings {', '.join(keys) or 'none'}" + (f", not {encode_key}" if encode_key else ""),
            expected="one encoding, or its key",
            remedy="Name one with --encode-key (`ctpipe status STORE` lists them), or run `ctpipe encode` first.",
        )

    # -- writing ------------------------------------------------------------------------------------------------------

    def stage(self, array: NDArray[np.float16], meta: LatentMeta) -> LatentRecord:
        """Write a latent durably under a fresh path. It exists once a driver commits the returned row.

        Args:
            array: (C, d, h, w) float16, raw posterior mean.

        Raises:
            InputError: Wrong type, shape, key or geometry.
            NonFiniteError: NaN or infinity in the latent.
        """
        encoding = self.encoding(meta.encode_key)
        shape = validate_latent(array, encoding, meta.key, meta.role, meta.dz_mm, meta.valid_zyx)
        array = np.ascontiguousarray(array)
        d, h, w = valid_latents(meta.valid_zyx)
        moments = Moments.of(array[:, :d, :h, :w])
        path = f"latents.zarr/{meta.encode_key}/{meta.key}/{meta.role}/{uuid.uuid4().hex}"
        written = write_latent(self.location, path, array)
        depth, height, width = meta.valid_zyx
        return LatentRecord(
            key=meta.key,
            encode_key=meta.encode_key,
            role=meta.role,
            shape=shape,
            dtype="float16",
            path=path,
            z0_mm=float(meta.z0_mm),
            dz_mm=float(meta.dz_mm),
            valid_zyx=(int(depth), int(height), int(width)),
            crc32c=written.crc32c,
            sha256=written.sha256,
            mean=tuple(float(v) for v in moments.mean),
            std=tuple(float(v) for v in moments.std),
            round_trip_psnr=None if meta.round_trip_psnr is None else float(meta.round_trip_psnr),
            source_digest=meta.source_digest,
            compute_dtype=encoding.compute_dtype,
            device_kind=encoding.device_kind,
        )

    def writer(self) -> Writer:
        """The committing driver: ``with store.writer() as writer: writer.commit(records)``.

        Raises:
            StoreError: On entry, if a living driver holds the lease or the store is pinned.
        """
        return Writer(self.location, self)

    def attach(self, writer: Writer) -> None:
        """A writer opened: bring this object to the current snapshot."""
        if self._pinned or self._writer is not None:
            raise StoreError(
                "this store object is " + ("pinned at a snapshot" if self._pinned else "being written already"),
                expected="an unpinned store with no open writer",
                remedy="Open the store again without a snapshot, or use the writer that is open.",
            )
        self.refresh()
        self._writer = writer

    def detach(self, writer: Writer) -> None:
        """The writer closed."""
        if self._writer is writer:
            self._writer = None

    # -- reading ------------------------------------------------------------------------------------------------------

    def records(self, encode_key: str | None = None, role: LatentRole | None = None) -> list[LatentRecord]:
        """Committed latents, optionally of one encoding and role. For many rows prefer ``manifest_table``."""
        table = self.manifest_table()
        for name, value in (("encode_key", encode_key), ("role", role)):
            if value is not None:
                table = table.filter(pc.equal(table.column(name), value))
        return from_table(table, LatentRecord)

    def find(self, key: str, role: LatentRole, encode_key: str | None = None) -> LatentRecord | None:
        """One committed latent, or None.

        Raises:
            InputError: Several encodings hold it and none was asked for.
        """
        if self._finder is None:
            self._finder = RowFinder(self.location, self._snapshot, self.manifest_table, self._checked)
        return self._finder.find(key, role, encode_key)

    def read(self, record: LatentPlace, depth: slice | None = None, out: Latent | None = None) -> Latent:
        """A latent, or the slices ``depth`` of it, as (C, d, h, w) float16; checked against the row's CRC-32C.

        Args:
            out: Contiguous float16 array to fill instead of a new one.

        Raises:
            CorruptLatentError: Bytes are missing or changed; names the key.
        """
        name = f"{record.key} {record.role}"
        return read_latent(self.location, record.path, record.shape, record.crc32c, depth, out, name=name)

    def select(self, encode_key: str, role: LatentRole, split: Split | None = None) -> list[LatentRecord]:
        """Committed latents of an encoding and role, optionally of one split, in order of key."""
        rows = sorted(self.records(encode_key, role), key=lambda r: r.key)
        if split is None:
            return rows
        table, name = (
            (self.catalog_table(("series_key", "split")), "series_key")
            if role in ("thin", "thick")
            else (self.pairs_table(("pair_key", "split")), "pair_key")
        )
        wanted = set(table.filter(pc.equal(table["split"], split))[name].to_pylist())
        return [row for row in rows if row.key in wanted]

    def zarr_array(self, record: LatentRecord) -> zarr.Array[Any]:
        """A latent as a plain, read-only Zarr array over the store's own file; position and keys are attributes.

        Raises:
            InputError: zarr is not installed.
        """
        from latentcache.zarr_view import open_array

        return open_array(self.location, record)

    def zarr_group(self, encode_key: str, role: LatentRole = "thin", split: Split | None = None) -> zarr.Group:
        """A split's latents (all of them by default) as one read-only Zarr group, an array for each key.

        Raises:
            InputError: zarr is not installed.
        """
        from latentcache.zarr_view import open_group

        return open_group(self.location, self.select(encode_key, role, split))

    def whitening(self, encode_key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and population std per channel over the training split's thin latents, merged from the rows.

        Raises:
            InputError: There are none.
        """
        moments = training_moments(self, encode_key)
        return moments.mean, moments.std

    def generated(self, generation_key: str, create: bool = False) -> LatentStore:
        """The store of latents that a model sampled, of the same form, below this one.

        Raises:
            StoreError: There is none and ``create`` is false.
        """
        check_key("generation key", generation_key)
        location = self.location.child(f"generated/{generation_key}")
        if create:
            with contextlib.suppress(StoreError):  # sampled before: go on with it
                return LatentStore.create(
                    location, secret_fingerprint=self.secret_fingerprint, split_seed=self.split_seed
                )
        return LatentStore.open(location)
