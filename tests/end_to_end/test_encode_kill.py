"""Killing `ctpipe encode` at random instants and running it again ends in the manifest of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latentcache import LatentStore

COMMAND = [sys.executable, "-m", "cli.main"]


def run(*words: str | Path) -> None:
    subprocess.run([*COMMAND, *map(str, words)], check=True, capture_output=True)


def rows(store: Path) -> list[dict[str, Any]]:
    """The manifest without the attempt's own path: everything that must not depend on how often it was interrupted."""
    found = [asdict(record) for record in LatentStore.open(store).records()]
    for row in found:
        del row["path"]
    return sorted(found, key=lambda row: (row["key"], row["role"]))


def test_sigkill_at_random_instants_loses_nothing(tmp_path: Path) -> None:
    run("phantom", tmp_path / "data", "--patients", "4", "--size", "64", "--thin-slices", "44")
    run("ingest", tmp_path / "data", tmp_path / "calm")
    shutil.copytree(tmp_path / "calm", tmp_path / "stormy")
    options = ["--vae", "tiny", "--threads", "1"]
    start = time.monotonic()
    run("encode", tmp_path / "calm", *options)
    whole = time.monotonic() - start
    kills, rng = 0, random.Random(4)
    for attempt in range(40):
        process = subprocess.Popen(
            [*COMMAND, "encode", str(tmp_path / "stormy"), *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            # Mostly after start-up, and late enough in the end that a slow machine finishes too.
            code = process.wait(rng.uniform(0.3, 1.0) * whole * (1 + attempt / 10))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            continue
        assert code == 0
        break
    assert kills > 0
    assert rows(tmp_path / "stormy") == rows(tmp_path / "calm")
    assert len(rows(tmp_path / "calm")) == 12
    # What a killed attempt left behind is not in the way, and nothing that is committed is missing or torn.
    store = LatentStore.open(tmp_path / "stormy")
    for record in store.records():
        assert store.read(record).shape == record.shape
