"""Small studies through ingest, encode, interpolate and send while everything fails now and then: each exactly once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.soak import AWS, SECRET, Soaked, Tally, pacs_problems, soak
from tests.support.soak_worker import BATCH, ROLES


@pytest.mark.slow
def test_every_study_comes_through_exactly_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are killed by what has been done: no figure depends on how busy the machine is."""
    monkeypatch.setenv("CTPIPE_SECRET", SECRET)
    for name in AWS:
        monkeypatch.setenv(name, "")
    found = soak(tmp_path, BATCH, seconds=7200.0, kill_every=(1, 60))
    assert found.problems == []
    assert found.done == BATCH
    assert all(found.tally.kills[role] > 1 for role in ROLES)
    assert min(found.tally.pacs_kills, found.tally.store_kills) > 0
    assert found.as_dict()["catalogue"]["peak_in_the_last_quarter"]["temporary"] == 0
    assert Tally.load(tmp_path) == found.tally


def test_growth_is_measured_within_workers_that_lived_long_enough() -> None:
    rows = [
        {"role": "deliver", "life": life, "studies": 100 * n, "time": 60.0 * n, "seconds": 60.0, "cpu_s": 9.0}
        | {"undisturbed": True, "rss_mib": 300.0 + growth * n, "files": 9, "threads": 1, "temporary": 0}
        for life, growth, batches in ((0, 0.0, 3), (1, 5.0, 8))
        for n in range(1, batches + 1)
    ]
    found = Soaked(2000, 800, Tally(), {}, [], 0, rows)
    assert found.growth("deliver", "rss_mib") == 5.0 * (6.5 - 2)
    assert found.growth("deliver", "files") == 0
    assert found.growth("catalogue", "files") is None
    assert found.by_thousand("deliver")[0]["cpu_s_per_study"] == 9.0 / BATCH


def test_the_judge_finds_what_a_pacs_lacks_and_what_it_holds_in_two_forms(tmp_path: Path) -> None:
    whole = [f"1.2.{study}\t1.2.{study}.1\t1.2.{study}.1.{n}\t77\n" for study in range(3) for n in range(6)]
    (tmp_path / "pacs.tsv").write_text("".join([*whole, whole[0]]))
    assert pacs_problems(tmp_path, 3) == []
    (tmp_path / "pacs.tsv").write_text("".join([*whole[:-1], whole[0].replace("77", "78")]))
    assert pacs_problems(tmp_path, 4) == [
        "the PACS holds 3 of 4 studies, 0 with several series, 1 in part, 1 instances of several contents"
    ]
