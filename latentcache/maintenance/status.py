"""Counts of a store's content."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentcache import PAIR_ROLES, CtpipeError, LatentStore
from latentcache.maintenance.pins import pinned_snapshots
from latentcache.maintenance.staleness import stale_rows
from latentcache.tables import snapshot_numbers


def status(store: LatentStore) -> dict[str, Any]:
    """Counts of series, pairs and latents at the store's snapshot, what is still to encode, snapshots and pins."""
    catalog = store.catalog_table(("series_key", "role", "status", "split"))
    pairs = store.pairs_table(("split", "status"))
    manifest = store.manifest_table(("encode_key", "key", "role"))
    whole = pc.is_in(catalog["role"], value_set=pa.array(["thin", "thick"]))
    usable = catalog.filter(pc.and_(whole, pc.equal(catalog["status"], "ok")))
    training = usable.filter(pc.equal(usable["split"], "train"))["series_key"]
    encodings: dict[str, Any] = {}
    for encode_key in store.encode_keys():
        rows = manifest.filter(pc.equal(manifest["encode_key"], encode_key))
        of_pairs = pc.is_in(rows["role"], value_set=pa.array(PAIR_ROLES, pa.string()))
        own = rows.filter(pc.invert(of_pairs))["key"].combine_chunks()
        facts = _encoding(store, encode_key)
        wanted = training if facts.get("mirrored") else usable["series_key"]
        encodings[encode_key] = {
            "latents": _counts(rows["role"]),
            "series_missing": len(wanted) - int(pc.sum(pc.is_in(wanted, value_set=own)).as_py() or 0),
            "stale": int(stale_rows(store, encode_key).num_rows),
            **facts,
        }
    return {
        "snapshot": store.snapshot,
        "snapshots": snapshot_numbers(store.location),
        "pinned": {str(number): names for number, names in sorted(pinned_snapshots(store.location).items())},
        "series": {
            "total": len(catalog),
            "quarantined": _quarantined(catalog),
            "by_role": _counts(catalog["role"]),
            "by_split": _counts(catalog["split"]),
        },
        "pairs": {
            "total": len(pairs),
            "quarantined": _quarantined(pairs),
            "by_split": _counts(pairs["split"]),
        },
        "encodings": encodings,
        "generated": list(store.location.folders("generated")),
    }


def _counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Count each value of a column of text; the empty one as ``none``."""
    return {row["values"] or "none": row["counts"] for row in pc.value_counts(column).to_pylist()}


def _quarantined(table: pa.Table) -> int:
    return int(pc.sum(pc.not_equal(table["status"], "ok")).as_py() or 0)


def _encoding(store: LatentStore, encode_key: str) -> dict[str, Any]:
    try:
        encoding = store.encoding(encode_key)
    except CtpipeError as error:
        return {"problem": str(error)}
    window = f"{encoding.window_center:g}:{encoding.window_width:g}"
    return {
        "vae_sha256": encoding.vae_sha256,
        "window": window,
        "posterior": encoding.posterior,
        "tiling": encoding.extra.get("tiling", {}).get("kind", "exact"),
        "mirrored": encoding.mirrored,
    }
