"""Text columns as numbers: joins and duplicates among a million keys without a Python object per row.

Keys are 16 hexadecimal digits, so a column of them is in Arrow's memory as two 64-bit words a row. Whatever is found
by a hash of the words is compared word for word before it is believed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Words = NDArray[np.uint64]
WORD = 8
_ODD = tuple(np.uint64(v) for v in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F))


def packed(column: pa.ChunkedArray) -> Words:
    """(n, k) the bytes of each text as k words, padded with zeros; without a copy where all have 8 k bytes."""
    chunks = column.chunks
    if not len(column):
        return np.zeros((0, 1), np.uint64)
    array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)
    if isinstance(array, pa.DictionaryArray):
        of_dictionary: Words = packed(pa.chunked_array([array.dictionary]))[np.asarray(array.indices)]
        return of_dictionary
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    length = int(offsets[1] - offsets[0])
    if length and length % WORD == 0 and bool((np.diff(offsets) == length).all()):
        count = len(array) * length // WORD
        if int(offsets[0]) % WORD == 0:
            words = np.frombuffer(array.buffers()[2], np.uint64, count, int(offsets[0]))
        else:
            words = np.frombuffer(array.buffers()[2], np.uint8, count * WORD, int(offsets[0])).copy().view(np.uint64)
        return words.reshape(len(array), -1)
    codes = array.dictionary_encode()
    texts = np.asarray([text.encode() for text in codes.dictionary.to_pylist()])
    width = -(-max(texts.itemsize, 1) // WORD) * WORD
    of_texts: Words = texts.astype(f"S{width}").view(np.uint64).reshape(len(texts), -1)[np.asarray(codes.indices)]
    return of_texts


def mixed(words: Words) -> NDArray[np.uint64]:
    """(n,) a 64-bit hash of each row of words: equal for equal rows, and all but never otherwise."""
    out = np.zeros(len(words), np.uint64)
    for column in words.T:
        out ^= column
        out *= _ODD[0]
        out ^= out >> np.uint64(29)
        out *= _ODD[1]
        out ^= out >> np.uint64(32)
    return out


def surely_distinct(table: pa.Table, names: Sequence[str]) -> bool:
    """Whether no two rows are equal in all of these columns. False may also mean that two hashes met."""
    hashes = np.sort(mixed(np.column_stack([mixed(packed(table.column(name))) for name in names])))
    return not bool((hashes[1:] == hashes[:-1]).any())


def positions(keys: pa.ChunkedArray, among: pa.ChunkedArray) -> NDArray[np.int64]:
    """For each key its first position among others; -1 where it is not there."""
    wanted, held = packed(keys), packed(among)
    if len(held) and wanted.shape[1] == held.shape[1]:
        hashes, sought = mixed(held), mixed(wanted)
        order, turn = np.argsort(hashes), np.argsort(sought)  # in order, the search finds its way in the cache
        hashes = hashes[order]
        place = np.minimum(np.searchsorted(hashes, sought[turn]), len(hashes) - 1)
        found = np.empty(len(sought), np.int64)
        found[turn] = np.where(hashes[place] == sought[turn], order[place], -1)
        alike = (held[found] == wanted).all(axis=1) | (found < 0)
        if bool(alike.all()) and not bool((hashes[1:] == hashes[:-1]).any()):
            return found
    first = pc.index_in(keys, value_set=among.combine_chunks())
    return np.asarray(pc.fill_null(first, -1), np.int64)


def row_codes(table: pa.Table, names: Sequence[str]) -> NDArray[np.int64]:
    """One integer a row, equal where the named columns are equal."""
    codes = np.zeros(table.num_rows, np.int64)
    for name in names:
        column = pc.dictionary_encode(table.column(name)).combine_chunks()
        part = column if isinstance(column, pa.DictionaryArray) else column.chunk(0)
        codes = codes * max(len(part.dictionary), 1) + part.indices.to_numpy(zero_copy_only=False)
    return codes
