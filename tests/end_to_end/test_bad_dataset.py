"""A dataset with an unreadable zip, an empty zip, a zip without DICOM, and a patient with only a thick series."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from latentcache import LatentStore
from pipeline.identity import PrivateStore, whois
from tests.support.hospital import study, write_zip


def ctpipe(*words: str | Path) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, words), "--json"], capture_output=True, text=True, check=False
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad") / "archive"
    code, _, _ = ctpipe("phantom", root, "--patients", "4", "--size", "64", "--thin-slices", "44")
    assert code == 0
    folder = root / "APE"
    (folder / "MUELLER_HANS_unreadable.zip").write_bytes(b"PK\x03\x04 this is not a zip" * 50)
    with zipfile.ZipFile(folder / "MUELLER_HANS_empty.zip", "w"):
        pass
    with zipfile.ZipFile(folder / "MUELLER_HANS_letters.zip", "w") as letters:
        letters.writestr("letter.txt", "Dear Dr Smith")
    # The first phantom keeps its thick series alone.
    victim = sorted(folder.glob("patient_*.zip"))[0]
    with zipfile.ZipFile(victim) as whole:
        thick = {name: whole.read(name) for name in whole.namelist() if name.startswith("1/")}
    with zipfile.ZipFile(victim, "w") as part:
        for name, data in thick.items():
            part.writestr(name, data)
    return root


def test_the_rest_completes_and_what_was_set_aside_is_named_by_key(dataset: Path, tmp_path: Path) -> None:
    code, summary, said = ctpipe("ingest", dataset, tmp_path / "store")
    assert code == 3
    store = LatentStore.open(tmp_path / "store")
    series, pairs = store.series(), store.pairs()
    assert sum(s.status == "ok" and s.role == "thin" for s in series) == 3
    assert len(pairs) == 3
    text = json.dumps(summary)
    for reason in ("zip", "DICOM", "thin"):
        assert reason in text
    assert "MUELLER" not in said
    paired = {p.thick_key for p in pairs}
    lonely = {s.patient_key for s in series if s.role == "thick" and s.series_key not in paired}
    assert len(lonely) == 1
    assert next(iter(lonely)) in text

    code, _, said = ctpipe("encode", tmp_path / "store", "--vae", "tiny", "--threads", "1")
    assert code == 0
    assert "MUELLER" not in said
    # Three pairs give three latents each, and the lone thick series its own.
    assert len(LatentStore.open(tmp_path / "store").records()) == 10
    leftovers = [p for p in (tmp_path / "store").rglob("*") if p.name.endswith((".part", ".tmp", ".aside"))]
    assert leftovers == []


def test_ingest_again_finds_the_same_and_touches_nothing(dataset: Path, tmp_path: Path) -> None:
    first, _, _ = ctpipe("ingest", dataset, tmp_path / "store")
    before = LatentStore.open(tmp_path / "store").series()
    second, _, _ = ctpipe("ingest", dataset, tmp_path / "store")
    assert (first, second) == (3, 3)
    assert LatentStore.open(tmp_path / "store").series() == before


def test_what_is_no_archive_is_named_by_key_and_ends_in_no_traceback(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "APE"
    write_zip(folder / "a.zip", study("PAT1", 3))
    (folder / "MUELLER_HANS.zip").symlink_to("/nonexistent")
    os.mkfifo(folder / "MUELLER_PIPE.zip")
    (folder / "MUELLER_OLD.7z").write_bytes(b"7z")
    (folder / "MUELLER_LOOSE").mkdir()
    (folder / "MUELLER_LOOSE" / "notes").write_text("nothing")
    os.mkfifo(folder / "MUELLER_LOOSE" / "MUELLER_PIPE")
    code, summary, said = ctpipe("ingest", tmp_path / "data", tmp_path / "store", "--engine", "inline")
    assert code == 3
    assert summary["pairs"] == 1
    assert [item["kind"] for item in summary["set_aside"]] == ["archive"] * 4
    assert "MUELLER" not in said
    assert "Traceback" not in said
    private = PrivateStore.open(str(tmp_path / "store"))
    for item in summary["set_aside"]:
        assert "MUELLER" in whois(private, item["key"]).text(), "the private part knows what was meant"
