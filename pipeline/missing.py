"""Which latents a store still lacks, told in Arrow: a million series take seconds, and no Python object a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentcache.records import LatentRole
from latentcache.store import LatentStore

ALL_ROLES: tuple[LatentRole, ...] = ("thin", "thick", "thick_on_thin")


def missing_latents(store: LatentStore, encode_key: str, roles: Sequence[LatentRole] = ALL_ROLES) -> pa.Table:
    """A row for every pair, or lone series, that lacks a latent under an encode key.

    A series that several pairs share is wanted once, by the first of them.

    Returns:
        Columns ``pair_key`` (empty for a lone series), ``thin_key``, ``thick_key`` (empty where there is none) and the
        booleans ``thin``, ``thick``, ``thick_on_thin``: which latents are missing.
    """
    catalog = store.catalog_table(("series_key", "role", "status"))
    usable = pc.and_(pc.equal(catalog["status"], "ok"), pc.not_equal(catalog["role"], "other"))
    catalog = catalog.filter(usable)
    manifest = store.manifest_table(("key", "encode_key", "role"))
    manifest = manifest.filter(pc.equal(manifest["encode_key"], encode_key))
    have = {role: manifest.filter(pc.equal(manifest["role"], role))["key"].combine_chunks() for role in ALL_ROLES}

    def lacks(keys: pa.ChunkedArray, role: LatentRole) -> NDArray[np.bool_]:
        if role not in roles:
            return np.zeros(len(keys), dtype=bool)
        return ~np.asarray(pc.is_in(keys, value_set=have[role]))

    pairs = store.pairs_table(("pair_key", "thin_key", "thick_key", "status"))
    known = catalog["series_key"].combine_chunks()
    good = pc.and_(pc.is_in(pairs["thin_key"], value_set=known), pc.is_in(pairs["thick_key"], value_set=known))
    pairs = pairs.filter(pc.and_(good, pc.equal(pairs["status"], "ok")))
    paired = pa.table(
        {
            "pair_key": pairs["pair_key"],
            "thin_key": pairs["thin_key"],
            "thick_key": pairs["thick_key"],
            "thin": lacks(pairs["thin_key"], "thin") & _first(pairs["thin_key"]),
            "thick": lacks(pairs["thick_key"], "thick") & _first(pairs["thick_key"]),
            "thick_on_thin": lacks(pairs["pair_key"], "thick_on_thin"),
        }
    )
    claimed = pa.chunked_array([*pairs["thin_key"].chunks, *pairs["thick_key"].chunks], pa.string()).combine_chunks()
    lone = catalog.filter(pc.invert(pc.is_in(catalog["series_key"], value_set=claimed)))
    is_thin = np.asarray(pc.equal(lone["role"], "thin"))
    alone = pa.table(
        {
            "pair_key": pa.array([""] * len(lone), pa.string()),
            "thin_key": pc.if_else(pa.array(is_thin), lone["series_key"], ""),
            "thick_key": pc.if_else(pa.array(is_thin), "", lone["series_key"]),
            "thin": lacks(lone["series_key"], "thin") & is_thin,
            "thick": lacks(lone["series_key"], "thick") & ~is_thin,
            "thick_on_thin": np.zeros(len(lone), dtype=bool),
        }
    )
    table = pa.concat_tables([paired, alone])
    return table.filter(pc.or_(pc.or_(table["thin"], table["thick"]), table["thick_on_thin"]))


def _first(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Whether each value is the first of its kind."""
    codes = pc.dictionary_encode(column).combine_chunks()
    indices = np.asarray(codes.indices) if isinstance(codes, pa.DictionaryArray) else np.zeros(0, dtype=np.int64)
    out = np.zeros(len(indices), dtype=bool)
    out[np.unique(indices, return_index=True)[1]] = True
    return out
