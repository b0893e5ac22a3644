"""The tasks that are left: what the catalog wants and the manifest lacks, told in Arrow and made one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.freshness import pair_digest
from latentcache.records import LatentRole, PairRecord
from latentcache.schema import from_table
from latentcache.store import LatentStore
from pipeline.encode import EncodeTask, Wanted
from pipeline.missing import ALL_ROLES, missing_latents
from pipeline.volume import SeriesPointer

AT_ONCE = 1000
"""Tasks whose rows are looked up together."""


class EncodePlan:
    """What a store lacks under an encode key, at its snapshot.

    One task a pair and one a lone series. A pair's volumes are read once for its up to three latents. A pair that the
    pixel proof quarantined gives no ``thick_on_thin``; its series still give their own latents.

    Args:
        pointer: Where a series lies, by its key; called only when its task is asked for.
    """

    def __init__(
        self,
        store: LatentStore,
        encode_key: str,
        pointer: Callable[[str], SeriesPointer],
        roles: Sequence[LatentRole] = ALL_ROLES,
    ) -> None:
        self.store, self.encode_key, self.pointer = store, encode_key, pointer
        self.missing = missing_latents(store, encode_key, roles)

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
