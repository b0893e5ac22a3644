from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from latentcache import Encoding, LatentMeta
from pipeline.encode import missing_latents
from pipeline.encode.plan import EncodePlan
from pipeline.ingest import IngestOptions, ingest, open_stores
from tests.support.hospital import thick, thin, write_zip


def test_it_tells_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sets of Python objects and `EncodePlan`, as latents are committed one after the other."""
    monkeypatch.delenv("CTPIPE_SECRET", raising=False)
    ids = {"study": "1.2.8", "patient": "P8", "frame": "1.9.8"}
    write_zip(
        tmp_path / "data" / "a.zip",
        [thick(), thin(), thick("1.2.3.6", spacing=4.0, n=5), thick("1.2.8.5", **ids)],
    )
    store, private = open_stores(str(tmp_path / "store"))
    ingest(str(tmp_path / "data"), store, private, IngestOptions())
    assert len(store.pairs()) == 2
    encoding = Encoding(vae_sha256="0" * 64, vae_architecture={}, window_center=40.0, window_width=400.0)
    key = store.register_encoding(encoding)

    def by_hand() -> set[tuple[str, str]]:
        wanted = {(s.series_key, s.role) for s in store.series() if s.status == "ok" and s.role != "other"}
        wanted |= {(p.pair_key, "thick_on_thin") for p in store.pairs() if p.status == "ok"}
        return wanted - {(r.key, r.role) for r in store.records(key)}

    def by_plan() -> set[tuple[str, str]]:
        tasks = list(EncodePlan(store, key, private.pointer))
        assert len(tasks) == len(EncodePlan(store, key, private.pointer))
        return {(want.key, want.role) for task in tasks for want in task.wanted}

    def by_arrow() -> set[tuple[str, str]]:
        rows = missing_latents(store, key).to_pylist()
        named = {"thin": "thin_key", "thick": "thick_key", "thick_on_thin": "pair_key"}
        found = [(row[named[role]], role) for row in rows for role in named if row[role]]
        assert len(found) == len(set(found))
        return set(found)

    left = by_arrow()
    assert len(left) == 6
    for series, role in sorted(left):
        assert by_arrow() == by_plan() == by_hand()
        record = store.stage(
            np.zeros((4, 1, 4, 4), np.float16),
            LatentMeta(
                encode_key=key,
                key=series,
                role=role,  # type: ignore[arg-type]
                z0_mm=0.0,
                dz_mm=4.0,
                valid_zyx=(4, 16, 16),
                source_digest="d",
            ),
        )
        with store.writer() as writer:
            writer.commit([record])
    assert not by_arrow()
    assert not by_plan()
    assert missing_latents(store, "f" * 16).num_rows == 3
    assert missing_latents(store, "f" * 16, roles=("thick",)).num_rows == 3

    pair = store.pairs()[0]
    store.append_catalog([], [replace(pair, status="quarantined", reason="refused by its pixels")])
    assert pair.pair_key not in missing_latents(store, "f" * 16)["pair_key"].to_pylist()
