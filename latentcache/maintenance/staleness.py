"""Freshness: whether a latent was made from the archive that the catalog now describes.

A catalog row holds a digest of its source's members; a latent's row holds the digest that it was made from. They differ
once an archive has changed and been ingested again. An empty digest says nothing and is never unlike another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256 as _digest
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentcache import LATENT_ROLES, PAIR_ROLES, LatentRole, LatentStore

HEX = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), np.uint16)
REFINED_BY = "/"
"""Between the digest of a refined latent's sources and the SHA-256 of its refiner."""


def pair_digest(thin: str, thick: str) -> str:
    """Digest of the latent that depends on both sources of a pair; empty if either is."""
    return _digest(f"{thin}|{thick}".encode()).hexdigest()[:16] if thin and thick else ""


def pair_digests(thin: pa.ChunkedArray, thick: pa.ChunkedArray) -> pa.ChunkedArray:
    """``pair_digest`` of two columns."""
    known = pc.and_(pc.not_equal(thin, ""), pc.not_equal(thick, ""))
    joined = pc.binary_join_element_wise(thin, thick, "|").cast(pa.binary())
    digests = b"".join([_digest(text).digest() for text in joined.to_pylist()])
    first = np.frombuffer(digests, np.uint8).reshape(-1, 32)[:, :8]
    # As hexadecimal digits all at once: formatting them one by one costs more than hashing.
    ends = np.arange(len(first) + 1, dtype=np.int32) * 16
    text = pa.StringArray.from_buffers(len(first), pa.py_buffer(ends), pa.py_buffer(HEX[first].tobytes()))
    return pc.if_else(known, text, "")


def refined_digest(thin: str, thick: str, refiner_sha256: str) -> str:
    """Source digest of a refined latent: that of the pair, and which refiner made it."""
    return f"{pair_digest(thin, thick)}{REFINED_BY}{refiner_sha256}"


def refiner_of_digest(digest: str) -> str:
    """SHA-256 of the refiner that a refined latent's source digest names; empty for any other latent's."""
    return digest.partition(REFINED_BY)[2]


def sources(digests: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of source digests without the refiner that some of them name."""
    return pc.replace_substring_regex(digests, f"{REFINED_BY}.*$", "")


def unlike(found: Iterable[Any], expected: Iterable[Any]) -> NDArray[np.bool_]:
    """Return a mask of where two columns of digests differ and neither is empty."""
    said = pc.and_(pc.not_equal(found, ""), pc.not_equal(expected, ""))
    return np.asarray(pc.and_(said, pc.not_equal(found, expected)), dtype=bool)


def stale_rows(
    store: LatentStore, encode_key: str, roles: Sequence[LatentRole] = LATENT_ROLES, refiner_sha256: str | None = None
) -> pa.Table:
    """Manifest rows of an encoding that were made from another source than the catalog now describes.

    With ``refiner_sha256`` refined latents of any other refiner are among them too.

    A row of a series or pair that the catalog no longer has, or has quarantined, is not among them: nothing would
    replace it.

    Returns:
        Columns ``key``, ``role`` and ``path``.
    """
    catalog = store.catalog_table(("series_key", "status", "source_digest"))
    catalog = catalog.filter(pc.equal(catalog["status"], "ok"))
    series, digests = catalog["series_key"].combine_chunks(), catalog["source_digest"]

    def digest_of(keys: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.fill_null(pc.take(digests, pc.index_in(keys, value_set=series)), "")

    def wanted(rows: pa.Table) -> pa.ChunkedArray:
        role = pc.is_in(rows["role"], value_set=pa.array(roles, pa.string()))
        return pc.and_(pc.equal(rows["encode_key"], encode_key), role)

    rows = store.manifest_table(("key", "role", "path", "source_digest"), wanted)
    pairs = store.pairs_table(("pair_key", "thin_key", "thick_key", "status"))
    pairs = pairs.filter(pc.equal(pairs["status"], "ok"))
    on_thin = pc.is_in(rows["role"], value_set=pa.array(PAIR_ROLES, pa.string()))
    of_pairs, of_series = rows.filter(on_thin), rows.filter(pc.invert(on_thin))
    held = pc.is_in(pairs["pair_key"], value_set=of_pairs["key"].combine_chunks())
    pairs = pairs.filter(held)
    expected = pair_digests(digest_of(pairs["thin_key"]), digest_of(pairs["thick_key"]))
    at = pc.index_in(of_pairs["key"], value_set=pairs["pair_key"].combine_chunks())
    changed = unlike(sources(of_pairs["source_digest"]), pc.fill_null(pc.take(expected, at), ""))
    if refiner_sha256 is not None:
        refined = np.asarray(pc.equal(of_pairs["role"], "refined_on_thin"), bool)
        changed |= refined & ~np.asarray(pc.ends_with(of_pairs["source_digest"], REFINED_BY + refiner_sha256), bool)
    found = [
        of_series.filter(pa.array(unlike(of_series["source_digest"], digest_of(of_series["key"])))),
        of_pairs.filter(pa.array(changed)),
    ]
    return pa.concat_tables(found).select(["key", "role", "path"])
