"""Damage has a way back: latents whose bytes are gone or changed are made anew from their archives."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentcache import METADATA, SHARD, CorruptLatentError, LatentRecord, LatentStore
from latentcache.maintenance import pin, verify
from tests.end_to_end.test_source_identity import bench, encode
from tests.pipeline.ingest.test_ingest import Bench
from tests.support.hospital import study, thin, write_zip

__all__ = ["bench"]


def flip(folder: Path) -> None:
    data = bytearray((folder / SHARD).read_bytes())
    data[len(data) // 3] ^= 4
    (folder / SHARD).write_bytes(data)


def cut(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def remove(folder: Path) -> None:
    shutil.rmtree(folder)


def garble(folder: Path) -> None:
    (folder / METADATA).write_text("{}")


def encoded(bench: Bench) -> list[LatentRecord]:
    write_zip(bench.data / "APE" / "a.zip", study("PAT1", 3))
    write_zip(bench.data / "APE" / "b.zip", [thin("1.7.1", study="1.7", patient="PAT7")])
    bench.run()
    assert encode(bench).failed == {}
    return sorted(LatentStore.open(bench.url).records(), key=lambda row: (row.role, row.key))


@pytest.mark.parametrize("damage", [flip, cut, remove, garble])
def test_damaged_latents_are_made_anew_and_pinned_runs_read_on(bench: Bench, damage: Callable[[Path], None]) -> None:
    rows = encoded(bench)
    store = LatentStore.open(bench.url)
    pin(store.location, "run", store.snapshot)
    good = {row.path: store.read(row).copy() for row in rows}
    for row in rows[1:]:
        damage(Path(bench.url, row.path))
    assert {row.path for row in verify(store).damaged} == {row.path for row in rows[1:]}
    plain = encode(bench)
    assert (plain.committed, plain.damaged) == (0, 0)
    rehearsal = encode(bench, repair=True, dry_run=True)
    assert (rehearsal.damaged, rehearsal.pinned, rehearsal.committed) == (len(rows) - 1, {"run": len(rows) - 1}, 0)
    summary = encode(bench, repair=True)
    assert (summary.damaged, summary.committed, summary.restored) == (len(rows) - 1,) * 3
    assert (summary.hopeless, summary.pinned, summary.failed) == ({}, {}, {})
    now = LatentStore.open(bench.url)
    assert verify(now).ok
    assert {row.path for row in now.records()} & {row.path for row in rows} == {rows[0].path}
    pinned = LatentStore.open(bench.url, snapshot=store.snapshot)
    assert verify(pinned).ok
    for row in pinned.records():
        np.testing.assert_array_equal(pinned.read(row), good[row.path])
    again = encode(bench, repair=True)
    assert (again.damaged, again.planned) == (0, 0)


def test_what_cannot_be_made_anew_stays_and_is_named(bench: Bench) -> None:
    """A damaged latent of a lost archive may still give most of its windows: it is not thrown away."""
    rows = encoded(bench)
    store = LatentStore.open(bench.url)
    pin(store.location, "run", store.snapshot)
    for row in rows:
        flip(Path(bench.url, row.path))
    (bench.data / "APE" / "b.zip").unlink()
    summary = encode(bench, repair=True)
    lone = bench.private.keys.series("1.7.1")
    assert list(summary.hopeless) == [f"{lone} thin"]
    assert "cannot be opened" in summary.hopeless[f"{lone} thin"]
    assert (summary.damaged, summary.restored, summary.pinned) == (4, 3, {"run": 4})
    found = verify(LatentStore.open(bench.url))
    assert [row.key for row in found.damaged] == [lone]
    assert str(bench.data) not in str(summary)


def test_a_damaged_latent_says_how_to_repair_it(bench: Bench) -> None:
    row = encoded(bench)[0]
    flip(Path(bench.url, row.path))
    with pytest.raises(CorruptLatentError, match="encode STORE --repair"):
        LatentStore.open(bench.url).read(row)


def test_a_run_whose_bytes_do_not_come_back_is_named(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other arithmetic gives other bytes: the pinned snapshot's row must not be given them."""
    rows = encoded(bench)
    store = LatentStore.open(bench.url)
    pin(store.location, "run", store.snapshot)
    thin_row = next(row for row in rows if row.role == "thin")
    flip(Path(bench.url, thin_row.path))
    from pipeline.encode import store as stage
    from tests.support.average_codec import AverageCodec

    class Other(AverageCodec):
        def encode(self, unit: Any, pad_multiple_zyx: tuple[int, int, int] = (4, 32, 32)) -> Any:
            return super().encode(unit, pad_multiple_zyx) * np.float32(1.001)

    monkeypatch.setattr(stage, "load_encoder", lambda device, settings: Other())
    summary = encode(bench, repair=True)
    assert (summary.damaged, summary.committed, summary.restored, summary.pinned) == (1, 1, 0, {"run": 1})
    with pytest.raises(CorruptLatentError):
        LatentStore.open(bench.url, snapshot=store.snapshot).read(thin_row)
    assert verify(LatentStore.open(bench.url)).ok
