"""Finds a manifest row by key without a Python object per row: a million rows cost 40 MB and a tenth of a second."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentcache import InputError, LatentRecord, LatentRole
from latentcache.storage import Location
from latentcache.tables.key_codes import WORD, mixed, packed
from latentcache.tables.schema import from_table
from latentcache.tables.snapshots import Snapshot, read_row, read_table

COLUMNS = ("encode_key", "key", "role")
HELD_ROWS = 200_000
FINDS = 16
"""A manifest of more rows than this (some 500 bytes each) is held in memory only after so many look-ups."""


class KeyIndex:
    """Hashes of the keys, sorted, of a manifest table (columns encode_key, key, role)."""

    def __init__(self, table: pa.Table) -> None:
        self._words = packed(table.column("key"))
        hashes = mixed(self._words)
        self._order = np.argsort(hashes)
        self._hashes = hashes[self._order]
        self._encode_keys, self._encode_code = _encoded(table.column("encode_key"))
        self._roles, self._role_code = _encoded(table.column("role"))

    def rows(self, key: str, role: str | None = None, encode_key: str | None = None) -> list[int]:
        """Row numbers of a key, optionally of one role and encoding, ascending; of each identity the first row."""
        width, text = WORD * self._words.shape[1], key.encode()
        if len(text) > width:
            return []
        wanted = np.frombuffer(text.ljust(width, b"\0"), np.uint64)
        hashed = mixed(wanted[None])[0]
        low, high = (int(np.searchsorted(self._hashes, hashed, side)) for side in ("left", "right"))
        found: dict[tuple[int, int], int] = {}
        for row in sorted(int(r) for r in self._order[low:high] if np.array_equal(self._words[r], wanted)):
            if (role is None or self._roles[self._role_code[row]] == role) and (
                encode_key is None or self._encode_keys[self._encode_code[row]] == encode_key
            ):
                found.setdefault((int(self._role_code[row]), int(self._encode_code[row])), row)
        return list(found.values())


class RowFinder:
    """Looks latents of one snapshot up, each read with one part of the manifest until it is worth holding it all.

    Args:
        whole: The manifest, which its owner then holds.
    """

    def __init__(
        self, location: Location, snapshot: Snapshot, whole: Callable[[], pa.Table], checked: set[str]
    ) -> None:
        self._location, self._snapshot, self._whole, self._checked = location, snapshot, whole, checked
        self._index = KeyIndex(read_table(location, snapshot, "manifest", COLUMNS, unique=False, checked=checked))
        self._finds = 0

    def find(self, key: str, role: LatentRole, encode_key: str | None) -> LatentRecord | None:
        """Raises InputError: several encodings hold it and none was asked for."""
        rows = self._index.rows(key, role, encode_key)
        if len(rows) > 1:
            raise InputError(
                f"{len(rows)} encodings of {key} {role}",
                expected="one encode key",
                remedy="Name the encode key; mixing encodings would mix unlike latents.",
            )
        found: LatentRecord | None = from_table(self._row(rows[0]), LatentRecord)[0] if rows else None
        return found

    def _row(self, row: int) -> pa.Table:
        self._finds += 1
        total = self._snapshot.rows("manifest")
        if total <= HELD_ROWS or self._finds > FINDS:
            whole = self._whole()
            if whole.num_rows == total:  # else later rows of an identity are left out, which the index counts
                return whole.slice(row, 1)
        return read_row(self._location, self._snapshot, "manifest", row, self._checked)


def _encoded(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray[tuple[int], np.dtype[np.int32]]]:
    array = pc.dictionary_encode(column).combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], pa.string()).dictionary_encode()
    return array.dictionary.to_pylist(), np.asarray(array.indices.to_numpy(zero_copy_only=False), np.int32)
