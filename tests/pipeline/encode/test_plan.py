"""What is left to encode: one task a pair, one a lone series, latent by latent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentcache import Encoding, LatentMeta, LatentStore, PairRecord
from latentcache.maintenance import pair_digest
from pipeline.encode.plan import EncodePlan
from pipeline.volume import SeriesPointer
from tests.latentcache.test_store import key, series

ENCODING = Encoding(vae_sha256="0" * 64, vae_architecture={}, window_center=40.0, window_width=400.0)
THIN, THICK, LONE, OTHER, PAIR = (key(n) for n in range(1, 6))


@pytest.fixture
def store(tmp_path: Path) -> LatentStore:
    made = LatentStore.create(tmp_path / "s", secret_fingerprint="f")
    made.register_encoding(ENCODING)
    rows = [series(n, role=role, source_digest=f"digest {n}") for n, role in ((1, "thin"), (2, "thick"), (3, "thin"))]
    made.append_catalog([*rows, series(4, role="other")], [pair()])
    return made


def pair(**changes: Any) -> PairRecord:
    row = PairRecord(PAIR, "s", "p", "APE", THICK, THIN, (0.0, 20.0), "train", json.dumps({"score": 1}))
    return replace(row, **changes)


def plan(store: LatentStore, **options: Any) -> EncodePlan:
    return EncodePlan(store, ENCODING.encode_key, lambda series_key: SeriesPointer(series_key, ()), **options)


def have(store: LatentStore, *latents: tuple[str, str]) -> None:
    with store.writer() as writer:
        for owner, role in latents:
            writer.commit(
                [
                    store.stage(
                        np.zeros((4, 1, 4, 4), np.float16),
                        LatentMeta(ENCODING.encode_key, owner, role, 0.0, 4.0, (4, 16, 16), source_digest=""),
                    )
                ]
            )  # fmt: skip


def test_a_pair_is_read_once_and_a_lone_series_alone(store: LatentStore) -> None:
    paired, lone = plan(store)
    assert (paired.name, lone.name) == (PAIR, LONE)
    assert [(w.key, w.role, w.source_digest) for w in paired.wanted] == [
        (PAIR, "thick_on_thin", pair_digest("digest 1", "digest 2")),
        (THIN, "thin", "digest 1"),
        (THICK, "thick", "digest 2"),
    ]
    assert [(w.key, w.role) for w in lone.wanted] == [(LONE, "thin")]
    assert paired.pair == pair()
    assert paired.thin == SeriesPointer(THIN, ())
    assert (lone.thin, lone.thick) == (SeriesPointer(LONE, ()), None)
    assert [w.role for task in plan(store, roles=("thick",)) for w in task.wanted] == ["thick"]


def test_it_resumes_latent_by_latent(store: LatentStore) -> None:
    have(store, (PAIR, "thick_on_thin"), (THIN, "thin"), (LONE, "thin"))
    (task,) = plan(store)
    assert [(w.key, w.role) for w in task.wanted] == [(THICK, "thick")]
    have(store, (THICK, "thick"))
    assert list(plan(store)) == []
    assert len(plan(store)) == 0


def test_the_pixel_proof_is_due_once_and_the_quarantined_are_left_out(store: LatentStore) -> None:
    store.append_catalog([], [pair(evidence=json.dumps({"pixel_proof": {}}))])
    assert next(iter(plan(store))).pair is None
    store.append_catalog([], [pair(status="quarantined")])
    assert [task.name for task in plan(store)] == [THIN, THICK, LONE]
    store.append_catalog([replace(row, status="quarantined") for row in store.series()], [pair()])
    assert list(plan(store)) == []
