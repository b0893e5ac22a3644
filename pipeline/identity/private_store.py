"""PRIVATE: the one place that knows who a key is and where its files lie. Mode 0700; nothing here is ever logged.

    secret                       64 hex digits (absent where CTPIPE_SECRET gives it)
    archives/<sequence>.parquet  a row an archive seen: where, size, time, digest, outcome
    series/<sequence>.parquet    one row per series: original identifiers, identity, and the member of every slice
    quarantine/<sequence>.parquet what was excluded and why, in full
    forgotten/<patient key>.json patients that must not come back with the next ingest
    whois/<time>.json            every question that `ctpipe whois` answered

Fragments are immutable and put once; a later row with the same key replaces the earlier. Only `forget` rewrites them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentcache import InputError, StoreError
from latentcache.storage import (
    SUPERUSER,
    Buffer,
    FileSystem,
    LocalLocation,
    Location,
    is_foreign,
    open_location,
    refuse_planted,
    user_number,
)
from pipeline.identity.keys import MIN_SECRET_BYTES, Keys
from pipeline.identity.private_tables import (
    ROW_KEY,
    SCHEMAS,
    ArchiveRow,
    Kind,
    QuarantineRow,
    SeriesRow,
    pointer_of,
    series_dict,
)
from pipeline.volume import SeriesPointer

SECRET_VARIABLE = "CTPIPE_SECRET"


def read_secret(location: Location, create: bool) -> bytes:
    """The secret: CTPIPE_SECRET, else the file ``secret``, else with ``create`` a fresh one of 256 bits.

    Raises:
        StoreError: There is none, it is too short, or the file and the environment disagree.
    """
    given = os.environ.get(SECRET_VARIABLE, "").strip().encode()
    try:
        kept = location.read("secret").strip()
    except FileNotFoundError:
        kept = b""
    if given and kept and given != kept:
        raise StoreError(
            f"{SECRET_VARIABLE} differs from the secret that this store was made with",
            expected="one secret for the life of a store",
            remedy=f"Unset {SECRET_VARIABLE}, or open the store that belongs to it.",
        )
    secret = given or kept
    if not secret and create:
        secret = secrets.token_hex(32).encode()
        with contextlib.suppress(FileExistsError):  # another first ingest was a moment earlier: its secret counts
            location.put_once("secret", [secret])
        secret = location.read("secret").strip()
    if not secret:
        raise StoreError(
            "no secret",
            expected=f"a file `secret` in the private folder, or {SECRET_VARIABLE}",
            remedy="Give the private folder with --private, or ingest first.",
        )
    if len(secret) < MIN_SECRET_BYTES:
        raise StoreError(
            f"a secret of {len(secret)} bytes",
            expected=f"at least {MIN_SECRET_BYTES}",
            remedy="For example 64 hex digits from a random source.",
        )
    return secret


_T = TypeVar("_T")
POINTER_COLUMNS = ("series_key", "series_uid", "sources", "slots", "members", "frames", "even", "seal", "simulated")
_SEQUENCE = re.compile(r"/(\d{20})-[^/]*$")
READ_ATTEMPTS = 5
"""Listings of fragments that may be overtaken in a row; a merge takes longer than a listing."""
COMPACT_ROWS = 50_000
"""Fragments below this many rows are merged: neither their number nor a merge's memory grows with the archive."""


class OwnerOnlyFiles(FileSystem):
    """Folders of mode 0700 and files of mode 0600, whatever the umask."""

    def write(self, path: Path, buffers: Sequence[Buffer]) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with open(path, "wb") as file:
            for buffer in buffers:
                file.write(buffer if isinstance(buffer, bytes) else buffer.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def mkdir(self, path: Path) -> None:
        path.mkdir(mode=0o700, exist_ok=True)


class PrivateStore:
    """The private side of a store. Open with :meth:`open`."""

    def __init__(self, location: Location, secret: bytes) -> None:
        self._at = location
        self._places: dict[str, tuple[str, int]] | None = None
        self._open: dict[str, pa.Table] = {}
        self.keys = Keys(secret)

    @classmethod
    def open(cls, store_url: str, private_url: str | None = None, create: bool = False) -> PrivateStore:
        """Open, or with ``create`` make, the private folder of a store.

        Args:
            store_url: The store's URL; its ``private`` folder is the default for a local store.
            private_url: Elsewhere. Needed where the store is on an object store.

        Raises:
            InputError: There is none, the secret is missing or too short, or it differs from CTPIPE_SECRET.
        """
        if private_url is None:
            if "://" in store_url and not store_url.startswith("file://"):
                raise InputError(
                    "a store on an object store without a place for its private part",
                    expected="--private URL",
                    remedy="Identities never lie beside the latents there: name a place of restricted access.",
                )
            private_url = f"{store_url.rstrip('/')}/private"
        location = open_location(private_url)
        if isinstance(location, LocalLocation):
            location = _local(location.root, create)
        return cls(location, read_secret(location, create))

    @property
    def secret(self) -> bytes:
        return self.keys.secret

    @property
    def fingerprint(self) -> str:
        return self.keys.fingerprint

    # -- writing ------------------------------------------------------------------------------------------------

    def add_archives(self, rows: Sequence[ArchiveRow]) -> None:
        """Record archives as seen: until then the next ingest reads them again."""
        self._append("archives", [asdict(row) for row in rows])

    def add_sources(self, rows: Sequence[SeriesRow]) -> None:
        """Record who the series are and where their slices lie."""
        self._append("series", [series_dict(row) for row in rows])

    def quarantine(self, rows: Sequence[QuarantineRow]) -> None:
        """Record what was excluded, in full."""
        dicts = [asdict(row) for row in rows]
        for row in dicts:
            row["row_key"] = self.keys.text("\x1f".join(row[n] for n in ("kind", "key", "url", "member", "reason")))
        self._append("quarantine", dicts)

    def log_whois(self, key: str, found: bool) -> None:
        """Record that somebody asked who a key is. Put before the answer is given."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        question = {"key": key, "found": found, "time": when, "uid": user_number()}
        self._at.put_once(f"whois/{_sequence()}.json", [json.dumps(question).encode()])

    def whois_log(self) -> list[dict[str, Any]]:
        """Every question asked so far, oldest first."""
        return [json.loads(self._at.read(name)) for name in self._names("whois")]

    def remember_to_forget(self, patient_key: str) -> None:
        """Note that a patient must not come back with the next ingest; only the key is kept."""
        self._at.put(f"forgotten/{patient_key}.json", b"{}")

    def forgotten(self) -> frozenset[str]:
        """Keys of patients that were forgotten."""
        names = (name.rpartition("/")[2] for name in self._names("forgotten"))
        return frozenset(name.removesuffix(".json") for name in names)

    # -- reading ------------------------------------------------------------------------------------------------

    def table(self, kind: Kind, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """Current rows as an Arrow table: of rows with one key, the last written."""
        key = ROW_KEY[kind]
        schema = SCHEMAS[kind]
        wanted = list(columns) if columns is not None else schema.names
        read = list(dict.fromkeys([*wanted, key]))
        parts = _while_merged(lambda: [self._fragment(name, read, where) for name in self._names(kind)])
        table = pa.concat_tables(parts) if parts else pa.schema([schema.field(n) for n in read]).empty_table()
        return latest(table, key).select(wanted)

    def pointer(self, series_key: str) -> SeriesPointer:
        """Return the pointer to a series' slices.

        Raises:
            InputError: No such series here.
        """
        return self.pointers([series_key])[series_key]

    def pointers(self, series_keys: Sequence[str]) -> dict[str, SeriesPointer]:
        """Return the pointers to many series' slices. Asked for in the order of ingest, each fragment is read once.

        Raises:
            InputError: Some of them have no source here.
        """
        return _while_merged(lambda: self._pointers(series_keys), self._let_go)

    def _pointers(self, series_keys: Sequence[str]) -> dict[str, SeriesPointer]:
        if self._places is None or any(key not in self._places for key in series_keys):
            self._places = self._find_places()
        missing = [key for key in series_keys if key not in self._places]
        if missing:
            raise InputError(
                f"series {missing[0]} has no source here" + (f" (and {len(missing) - 1} more)" if missing[1:] else ""),
                expected="the private part of the store that this series was ingested into",
                remedy="Give its place with --private, or ingest the archive again.",
            )
        found = {}
        for key in series_keys:
            name, row = self._places[key]
            if name not in self._open:
                # Few at a time: a fragment of 50,000 series of 300 slices takes some 60 MB.
                self._open = {**dict(list(self._open.items())[-1:]), name: self._fragment(name, POINTER_COLUMNS)}
            found[key] = pointer_of(self._open[name].slice(row, 1).to_pylist()[0])
        return found

    def _let_go(self) -> None:
        """Forget where rows were found."""
        self._places, self._open = None, {}

    def _find_places(self) -> dict[str, tuple[str, int]]:
        """Fragment and row of every series; of one series the last."""
        places: dict[str, tuple[str, int]] = {}
        for name in self._names("series"):
            keys = self._fragment(name, ["series_key"])["series_key"].to_pylist()
            places.update((key, (name, row)) for row, key in enumerate(keys))
        return places

    def identity(self, series_key: str) -> dict[str, Any]:
        """Original identifiers of a series: DICOM keyword to value. Empty where the series is unknown."""
        columns = ["series_key", "identity"]
        rows = self.table("series", columns, pc.field("series_key") == series_key).to_pylist()
        return dict(json.loads(rows[0]["identity"])) if rows else {}

    # -- upkeep -------------------------------------------------------------------------------------------------

    def compact(self) -> None:
        """Merge neighbouring small fragments of every kind; what they say does not change."""
        for kind in SCHEMAS:
            for run in _small_runs([(n, int(pq.read_metadata(self._source(n)).num_rows)) for n in self._names(kind)]):
                merged = latest(pa.concat_tables([self._fragment(name) for name in run]), ROW_KEY[kind])
                # Named just after its last part: until that is deleted both say the same, and the merge wins.
                self._put(f"{run[-1].removesuffix('.parquet')}m.parquet", merged)
                for name in run:
                    self._at.delete(name)

    def rewrite_without(self, kind: Kind, condition: pc.Expression) -> int:
        """Delete the rows that a condition selects from every fragment, older versions included; returns how many."""
        removed = 0
        for name in self._names(kind):
            table = self._fragment(name)
            kept = table.filter(~condition)
            if len(kept) == len(table):
                continue
            removed += len(table) - len(kept)
            self._let_go()
            if len(kept):
                self._put(f"{name.removesuffix('.parquet')}r.parquet", kept)
            self._at.delete(name)
        return removed

    def _append(self, kind: Kind, rows: Sequence[Mapping[str, Any]]) -> None:
        if rows:
            table = pa.Table.from_pylist(list(rows), schema=SCHEMAS[kind])
            self._put(f"{kind}/{_sequence(self._names(kind))}.parquet", table)

    def _put(self, name: str, table: pa.Table) -> None:
        self._let_go()
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        self._at.put(name, buffer.getvalue())

    def _names(self, folder: str) -> list[str]:
        return [entry.path for entry in self._at.list(folder) if not entry.path.rpartition("/")[2].startswith(".")]

    def _source(self, name: str) -> str | pa.BufferReader:
        """Return the source that Parquet reads from: a local file is read column by column, an object whole."""
        return (
            str(self._at.root / name) if isinstance(self._at, LocalLocation) else pa.BufferReader(self._at.read(name))
        )

    def _fragment(
        self, name: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None
    ) -> pa.Table:
        # The schema adds, as nulls, what fragments of an earlier version lack.
        schema = SCHEMAS[cast(Kind, name.partition("/")[0])]
        wanted = None if columns is None else list(columns)
        return pq.read_table(self._source(name), columns=wanted, filters=where, schema=schema)


def _while_merged(read: Callable[[], _T], before_again: Callable[[], None] = lambda: None) -> _T:
    """Return what ``read`` gives, begun again when a fragment that it had listed was merged away meanwhile."""
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return read()
        except FileNotFoundError:
            before_again()
    return read()


def one_of(column: str, values: Iterable[str]) -> pc.Expression:
    """The condition that a text column is one of some values; of none, if there are none."""
    return pc.field(column).isin(pa.array(sorted(set(values)), pa.string()))


def latest(table: pa.Table, key: str) -> pa.Table:
    """Of rows with one key keep the last, in place; a key's order is that of its last row."""
    if len(table) < 2:
        return table
    numbered = pa.table([table[key], pa.array(np.arange(len(table)))], names=["key", "row"])
    last = numbered.group_by("key").aggregate([("row", "max")])["row_max"]
    return table if len(last) == len(table) else table.take(last.combine_chunks().sort())


def _small_runs(sizes: Sequence[tuple[str, int]]) -> Iterator[list[str]]:
    """Groups of at least two neighbouring fragments that together stay under COMPACT_ROWS."""
    run: list[str] = []
    total = 0
    for name, rows in sizes:
        if total + rows > COMPACT_ROWS:
            if len(run) > 1:
                yield run
            run, total = [], 0
        if rows <= COMPACT_ROWS:
            run.append(name)
            total += rows
    if len(run) > 1:
        yield run


def _sequence(names: Sequence[str] = ()) -> str:
    """A name that sorts after all ``names`` and is taken by nobody else: by the time, or where clocks differ by count.

    A machine whose clock is behind would else write rows that are older than those that they replace.
    """
    last = max((int(found[1]) for found in map(_SEQUENCE.search, names) if found), default=-1)
    return f"{max(time.time_ns(), last + 1):020d}-{secrets.token_hex(4)}"


def _local(root: Path, create: bool) -> LocalLocation:
    refuse_planted(root)
    # The superuser, as in most containers, works in folders of others and for them.
    if is_foreign(root, follow=True) and os.geteuid() != SUPERUSER:
        raise InputError(
            "a private part that belongs to another user, who could read all that is written there",
            expected="a folder of this user's or the superuser's",
            remedy="Give another place with --private, or let its owner run the command.",
        )
    if create:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the private part cannot be made ({error.strerror})",
                expected="a place in which this user may make folders",
                remedy="Choose another place for the store, or give one for its private part with --private.",
            ) from error
    elif not root.is_dir():
        raise InputError(
            "this store has no private part here",
            expected="the folder that was written when its archives were ingested",
            remedy="Give its place with --private, or ingest first.",
        )
    if root.stat().st_mode & 0o077:
        try:
            root.chmod(0o700)
        except OSError as error:
            raise InputError(
                f"the private part may be read by others, and that cannot be changed ({error.strerror})",
                expected="a folder of mode 0700",
                remedy="Have its owner run chmod 700 on it, or mount it so.",
            ) from error
    return LocalLocation(root, OwnerOnlyFiles())
