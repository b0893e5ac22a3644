"""What a store holds, counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from latentcache.errors import CtpipeError
from latentcache.manifest import snapshot_numbers
from latentcache.pins import pinned_snapshots
from latentcache.store import LatentStore


def status(store: LatentStore) -> dict[str, Any]:
    """Counts of series, pairs and latents at the store's snapshot, what is still to encode, snapshots and pins."""
    catalog = store.catalog_table(("series_key", "role", "status", "split")).to_pylist()
    pairs = store.pairs_table(("split", "status")).to_pylist()
    manifest = store.manifest_table(("encode_key", "key", "role")).to_pylist()
    ok = {row["series_key"] for row in catalog if row["status"] == "ok" and row["role"] in ("thin", "thick")}
    encodings: dict[str, Any] = {}
    for encode_key in store.encode_keys():
        rows = [row for row in manifest if row["encode_key"] == encode_key]
        missing = ok - {row["key"] for row in rows if row["role"] in ("thin", "thick")}
        encodings[encode_key] = {
            "latents": dict(Counter(row["role"] for row in rows)),
            "series_missing": len(missing),
            **_encoding(store, encode_key),
        }
    return {
        "snapshot": store.snapshot,
        "snapshots": snapshot_numbers(store.location),
        "pinned": {str(number): names for number, names in sorted(pinned_snapshots(store.location).items())},
        "series": {
            "total": len(catalog),
            "quarantined": sum(row["status"] != "ok" for row in catalog),
            "by_role": dict(Counter(row["role"] for row in catalog)),
            "by_split": dict(Counter(row["split"] or "none" for row in catalog)),
        },
        "pairs": {
            "total": len(pairs),
            "quarantined": sum(row["status"] != "ok" for row in pairs),
            "by_split": dict(Counter(row["split"] or "none" for row in pairs)),
        },
        "encodings": encodings,
        "generated": list(store.location.folders("generated")),
    }


def _encoding(store: LatentStore, encode_key: str) -> dict[str, Any]:
    try:
        encoding = store.encoding(encode_key)
    except CtpipeError as error:
        return {"problem": str(error)}
    window = f"{encoding.window_center:g}:{encoding.window_width:g}"
    return {"vae_sha256": encoding.vae_sha256, "window": window, "posterior": encoding.posterior}
