"""Killing `ctpipe encode` at random instants and running it again ends in the manifest of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli.main import app
from latentcache import LatentStore
from tests.support.prepared import Script

OPTIONS = ("--vae", "tiny", "--threads", "1")
COMMAND = "from cli.main import main; main()"


def run(*words: str | Path) -> None:
    assert (app([*map(str, words)], standalone_mode=False) or 0) == 0


def rows(store: Path) -> list[dict[str, Any]]:
    """The manifest without the attempt's own path: everything that must not depend on how often it was interrupted."""
    found = [asdict(record) for record in LatentStore.open(store).records()]
    for row in found:
        del row["path"]
    return sorted(found, key=lambda row: (row["key"], row["role"]))


def paths(store: Path) -> set[str]:
    """Every path below the store at this moment; what vanishes while it is listed is left out."""
    return {os.path.join(folder, name) for folder, _, names in os.walk(store) for name in names}


def encode_until(store: Path, new_paths: int) -> bool:
    """Encode, and kill it once it has made that many new paths; returns whether it ended by itself first.

    By what it has done and not by the clock: the same on a machine of any speed.
    """
    before = paths(store)
    process = Script(COMMAND, ["encode", store, *OPTIONS])
    seen: set[str] = set()
    while process.poll() is None and len(seen) < new_paths:
        seen |= paths(store) - before
        time.sleep(0.01)
    if process.poll() is not None:
        assert process.returncode == 0
        return True
    process.kill()
    process.wait()
    return False


def test_sigkill_at_random_instants_loses_nothing(tmp_path: Path) -> None:
    run("phantom", tmp_path / "data", "--patients", "4", "--size", "32", "--thin-slices", "36")
    run("ingest", tmp_path / "data", tmp_path / "calm")
    shutil.copytree(tmp_path / "calm", tmp_path / "stormy")
    run("encode", tmp_path / "calm", *OPTIONS)
    rng = random.Random(4)
    killed = [not encode_until(tmp_path / "stormy", 1)]
    killed += [not encode_until(tmp_path / "stormy", rng.randint(2, 16)) for _ in range(5)]
    assert killed[0], "the first path is the lease, long before the end"
    run("encode", tmp_path / "stormy", *OPTIONS)
    assert rows(tmp_path / "stormy") == rows(tmp_path / "calm")
    assert len(rows(tmp_path / "calm")) == 12
    # What a killed attempt left behind is not in the way, and nothing that is committed is missing or torn.
    store = LatentStore.open(tmp_path / "stormy")
    for record in store.records():
        assert store.read(record).shape == record.shape
