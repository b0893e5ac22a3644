"""Latents that an earlier version made of another series are found by their pixels, retired and made anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pipeline.vae.vae
from latentcache import LatentMeta, LatentRecord, LatentStore
from latentcache.maintenance import verify
from pipeline.encode import check_sources, retire_foreign
from pipeline.encode.source_check import relative_difference
from tests.end_to_end.test_source_identity import NEWCOMER, TISSUE, bench, encode, hu_of, latents, phase
from tests.pipeline.ingest.test_ingest import Bench
from tests.support.average_codec import AverageCodec
from tests.support.hospital import study, write_zip

__all__ = ["bench"]


def swap_latents(bench: Bench, one: str, other: str) -> None:
    """What repro B left behind: each row holds the other series, under the digest that the catalog vouches for."""
    store = LatentStore.open(bench.url)
    rows = {row.key: row for row in store.records()}
    arrays = {key: store.read(rows[key]).copy() for key in (one, other)}
    with store.writer() as writer:
        import pyarrow as pa

        writer.retire(pa.table({"path": [rows[one].path, rows[other].path]}))
        writer.commit([_stage(store, rows[one], arrays[other]), _stage(store, rows[other], arrays[one])])


def _stage(store: LatentStore, row: LatentRecord, array: Any) -> LatentRecord:
    return store.stage(
        array, LatentMeta(encode_key=row.encode_key, key=row.key, role=row.role, z0_mm=row.z0_mm, dz_mm=row.dz_mm,
        valid_zyx=row.valid_zyx, source_digest=row.source_digest),
    )  # fmt: skip


def test_rows_of_another_series_are_found_retired_and_made_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write_zip(bench.data / "APE" / "a.zip", [phase("1.2.3.75", TISSUE), phase("1.2.3.30", NEWCOMER)])
    bench.run()
    encode(bench)
    one, other = (bench.private.keys.series(uid) for uid in ("1.2.3.75", "1.2.3.30"))
    swap_latents(bench, one, other)
    store = LatentStore.open(bench.url)
    assert verify(store).ok  # nothing but the pixels tells
    from tests.cli.commands.test_store_commands import run, text

    monkeypatch.setattr(pipeline.vae, "load_vae", lambda spec, device="cpu": AverageCodec())
    code, said = run("verify", bench.url, "--sources")
    assert code == 1
    assert sorted(said["foreign"]) == sorted([f"{one} thin", f"{other} thin"])
    assert all(by > 0.3 for by in said["foreign"].values())
    assert latents(bench).keys() == {one, other}
    assert "holds another series than its archive" in text("verify", bench.url, "--sources")
    code, said = run("verify", bench.url, "--sources", "--retire")
    assert (code, said["retired"]) == (1, 2)
    assert latents(bench) == {}
    assert encode(bench).committed == 2
    code, said = run("verify", bench.url, "--sources")
    assert (code, said["compared"], said["foreign"]) == (0, 2, {})
    assert hu_of(bench, latents(bench)[one]) == pytest.approx(TISSUE, abs=2)


def test_a_pair_that_was_refused_for_a_foreign_series_is_proved_anew(bench: Bench) -> None:
    write_zip(bench.data / "APE" / "a.zip", [s for n in (3, 4) for s in study(f"PAT{n}", n)])
    bench.run()
    encode(bench)
    store = LatentStore.open(bench.url)
    proved = {p.pair_key: p for p in store.pairs()}
    pair = next(p for p in proved.values() if p.status == "ok")
    other = next(p for p in store.pairs() if p.pair_key != pair.pair_key)
    swap_latents(bench, pair.thin_key, other.thin_key)
    evidence = json.loads(pair.evidence) | {"pixel_proof": {"ok": False}}
    refused = replace(pair, status="quarantined", reason="refused", evidence=json.dumps(evidence))
    store = LatentStore.open(bench.url)
    store.append_catalog([], [refused])
    found = check_sources(store, bench.private.pointer, AverageCodec())
    assert {row.key for row, _ in found.foreign.values()} == {pair.thin_key, other.thin_key}
    assert retire_foreign(store, found) == (2, 2)
    reopened = {p.pair_key: p for p in LatentStore.open(bench.url).pairs()}
    assert all("pixel_proof" not in p.evidence and p.status == "ok" for p in reopened.values())
    encode(bench)
    assert {p.pair_key: p for p in LatentStore.open(bench.url).pairs()} == proved


def test_an_archive_that_is_gone_and_another_vae_are_said_and_judge_nothing(bench: Bench) -> None:
    write_zip(bench.data / "APE" / "a.zip", [phase("1.2.3.75", TISSUE)])
    bench.run()
    key = encode(bench).encode_key
    store = LatentStore.open(bench.url)
    stranger = AverageCodec()
    stranger.sha256 = "0" * 64
    assert check_sources(store, bench.private.pointer, stranger).skipped == {key: 1}
    assert check_sources(store, bench.private.pointer, AverageCodec(), sample=0.0).compared == 0
    Path(bench.data / "APE" / "a.zip").unlink()
    found = check_sources(store, bench.private.pointer, AverageCodec())
    assert (found.compared, found.foreign) == (0, {})
    assert list(found.unread) == [bench.private.keys.series("1.2.3.75")]


def test_the_difference_is_measured_against_the_latents_own_spread() -> None:
    made = np.random.default_rng(0).normal(5, 2, (4, 6, 8, 8)).astype(np.float32)
    assert relative_difference(made, made) == 0
    assert relative_difference(made + 0.2, made) == pytest.approx(0.1, rel=0.05)
    assert relative_difference(made[:, :5], made) == float("inf")
    assert not relative_difference(made * np.nan, made) <= 0.03
