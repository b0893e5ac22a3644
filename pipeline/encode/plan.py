"""The tasks that are left: what the catalog wants and the manifest lacks, found in Arrow and made one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from latentcache import LATENT_ROLES, PAIR_ROLES, LatentRole, LatentStore, PairRecord
from latentcache.maintenance import pair_digest, refined_digest
from latentcache.tables import from_table
from pipeline.encode.task import EncodeTask, Wanted
from pipeline.volume import SeriesPointer

ALL_ROLES: tuple[LatentRole, ...] = ("thin", "thick", "thick_on_thin")
"""Roles that are encoded unless more is asked for; ``refined_on_thin`` needs a refiner."""


def missing_latents(
    store: LatentStore, encode_key: str, roles: Sequence[LatentRole] = ALL_ROLES, split: str | None = None
) -> pa.Table:
    """A row for every pair, or lone series, that lacks a latent under an encode key.

    A series that several pairs share is wanted once, by the first of them.

    Args:
        split: Only pairs of this split, and no lone series; None for all there is.

    Returns:
        Columns ``pair_key`` (empty for a lone series), ``thin_key``, ``thick_key`` (empty where there is none) and the
        booleans ``thin``, ``thick``, ``thick_on_thin``, ``refined_on_thin``: which latents are missing.
    """
    catalog = store.catalog_table(("series_key", "role", "status"))
    usable = pc.and_(pc.equal(catalog["status"], "ok"), pc.not_equal(catalog["role"], "other"))
    catalog = catalog.filter(usable)
    manifest = store.manifest_table(("key", "encode_key", "role"))
    manifest = manifest.filter(pc.equal(manifest["encode_key"], encode_key))
    have = {role: manifest.filter(pc.equal(manifest["role"], role))["key"].combine_chunks() for role in LATENT_ROLES}

    def lacks(keys: pa.ChunkedArray, role: LatentRole) -> NDArray[np.bool_]:
        if role not in roles:
            return np.zeros(len(keys), dtype=bool)
        return ~np.asarray(pc.is_in(keys, value_set=have[role]))

    pairs = store.pairs_table(("pair_key", "thin_key", "thick_key", "status", "split"))
    if split is not None:
        pairs = pairs.filter(pc.equal(pairs["split"], split))
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
            **{str(role): lacks(pairs["pair_key"], role) for role in PAIR_ROLES},
        }
    )
    claimed = pa.chunked_array([*pairs["thin_key"].chunks, *pairs["thick_key"].chunks], pa.string()).combine_chunks()
    lone = catalog.filter(pc.invert(pc.is_in(catalog["series_key"], value_set=claimed)))
    lone = lone if split is None else lone.slice(0, 0)
    is_thin = np.asarray(pc.equal(lone["role"], "thin"))
    alone = pa.table(
        {
            "pair_key": pa.array([""] * len(lone), pa.string()),
            "thin_key": pc.if_else(pa.array(is_thin), lone["series_key"], ""),
            "thick_key": pc.if_else(pa.array(is_thin), "", lone["series_key"]),
            "thin": lacks(lone["series_key"], "thin") & is_thin,
            "thick": lacks(lone["series_key"], "thick") & ~is_thin,
            **{str(role): np.zeros(len(lone), dtype=bool) for role in PAIR_ROLES},
        }
    )
    table = pa.concat_tables([paired, alone])
    return table.filter(pa.array(np.any([np.asarray(table[role]) for role in LATENT_ROLES], axis=0)))


def _first(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Whether each value is the first of its kind."""
    codes = pc.dictionary_encode(column).combine_chunks()
    indices = np.asarray(codes.indices) if isinstance(codes, pa.DictionaryArray) else np.zeros(0, dtype=np.int64)
    out = np.zeros(len(indices), dtype=bool)
    out[np.unique(indices, return_index=True)[1]] = True
    return out


AT_ONCE = 1000
"""Tasks whose rows are looked up together."""


class EncodePlan:
    """Tasks that a store lacks under an encode key, at its snapshot.

    One task per pair and one per lone series. A pair's volumes are read once for up to four latents. A pair that the
    pixel proof quarantined gives no ``thick_on_thin``; its series still give their own latents.

    Args:
        pointer: Where a series is, by its key; called only when its task is asked for.
        refiner_sha256: The refiner of ``refined_on_thin`` latents.
        split: Only pairs of this split.
    """

    def __init__(
        self,
        store: LatentStore,
        encode_key: str,
        pointer: Callable[[str], SeriesPointer],
        roles: Sequence[LatentRole] = ALL_ROLES,
        refiner_sha256: str = "",
        split: str | None = None,
    ) -> None:
        self.refiner_sha256 = refiner_sha256
        self.store, self.encode_key, self.pointer = store, encode_key, pointer
        self.missing = missing_latents(store, encode_key, roles, split)

    def __len__(self) -> int:
        return int(self.missing.num_rows)

    def __iter__(self) -> Iterator[EncodeTask]:
        """Tasks, pairs first."""
        catalog = self.store.catalog_table(("series_key", "source_digest"))
        known, digests = catalog["series_key"].combine_chunks(), catalog["source_digest"]
        all_pairs = self.store.pairs_table() if pc.any(pc.not_equal(self.missing["pair_key"], "")).as_py() else None

        def digests_of(keys: pa.ChunkedArray) -> list[str]:
            found: list[str] = pc.fill_null(pc.take(digests, pc.index_in(keys, value_set=known)), "").to_pylist()
            return found

        for first in range(0, len(self), AT_ONCE):
            rows = self.missing.slice(first, AT_ONCE)
            thin, thick = digests_of(rows["thin_key"]), digests_of(rows["thick_key"])
            pairs: dict[str, PairRecord] = {}
            if all_pairs is not None:
                chosen = all_pairs.filter(pc.is_in(all_pairs["pair_key"], value_set=rows["pair_key"].combine_chunks()))
                pairs = {pair.pair_key: pair for pair in from_table(chosen, PairRecord)}
            for row, thin_digest, thick_digest in zip(rows.to_pylist(), thin, thick, strict=True):
                yield self._task(row, thin_digest, thick_digest, pairs.get(row["pair_key"]))

    def _task(self, row: dict[str, Any], thin_digest: str, thick_digest: str, pair: PairRecord | None) -> EncodeTask:
        """The task of one row of ``missing_latents``."""
        thin_key, thick_key, pair_key = row["thin_key"], row["thick_key"], row["pair_key"]
        each: tuple[tuple[LatentRole, str, str], ...] = (
            ("thick_on_thin", pair_key, pair_digest(thin_digest, thick_digest)),
            ("refined_on_thin", pair_key, refined_digest(thin_digest, thick_digest, self.refiner_sha256)),
            ("thin", thin_key, thin_digest),
            ("thick", thick_key, thick_digest),
        )
        task = EncodeTask(
            pair_key or thin_key or thick_key,
            self.encode_key,
            self.pointer(thin_key) if thin_key else None,
            self.pointer(thick_key) if thick_key else None,
            tuple(Wanted(key, role, digest) for role, key, digest in each if row[role]),
        )
        proved = pair is None or "pixel_proof" in json.loads(pair.evidence or "{}")
        return task if proved else replace(task, pair=pair)
