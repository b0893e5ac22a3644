"""Kill writers at random moments, store after store, and look at what is left: test_commit.py and the long run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentcache import LatentStore
from latentcache.maintenance import collect, verify
from tests.support.killed_writer import ENCODING, latent, stage

LOOK_EVERY = 10


@dataclass(frozen=True)
class Aftermath:
    """Of one store: writers killed, latents that commit had returned, rows found, and what must be zero."""

    kills: int
    acknowledged: int
    rows: int
    lost: int
    problems: tuple[str, ...]
    in_flight_taken: int
    orphans_left: int

    @property
    def sound(self) -> bool:
        return not (self.lost or self.problems or self.in_flight_taken or self.orphans_left)


def kill_writers(folder: Path, kills: int, seed: int) -> Aftermath:
    """Start and kill ``kills`` writers of one new store, then verify it and collect its garbage."""
    root, ledger = folder / "store", folder / "ledger"
    LatentStore.create(root, secret_fingerprint="f").register_encoding(ENCODING)
    ledger.touch()
    chance, longest, before, lost = random.Random(seed), 0.02, 0, 0
    with _nursery(root, ledger) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for number in range(kills):
            nursery.stdin.write(f"{seed * kills + number}\n")
            writer = int(nursery.stdout.readline())
            time.sleep(chance.uniform(0.0, longest))
            os.kill(writer, signal.SIGKILL)
            assert int(nursery.stdout.readline()) == signal.SIGKILL
            if number % LOOK_EVERY == LOOK_EVERY - 1:
                noted = set(ledger.read_text().split())
                lost += len(noted - paths(root))
                if len(noted) < before + 3:
                    # A busy machine, or a grown store: give writers time to get somewhere.
                    longest = min(0.3, 1.5 * longest)
                before = len(noted)
    store = LatentStore.open(root)
    noted = set(ledger.read_text().split())
    in_flight = stage(store, "f" * 16)
    taken = collect(store).attempts  # all are younger than a day: any may be in flight
    np.testing.assert_array_equal(store.read(in_flight), latent(in_flight.key))
    collect(store, grace_s=-60)
    result = verify(store)
    problems = tuple(f"{p.subject}: {p.what}" for p in result.problems)
    return Aftermath(
        kills, len(noted), result.latents, lost + len(noted - paths(root)), problems, taken, result.orphans
    )


def paths(root: Path) -> set[str]:
    """Of every row of the current snapshot."""
    return set(LatentStore.open(root).manifest_table(("path",)).column("path").to_pylist())


@contextlib.contextmanager
def _nursery(root: Path, ledger: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).parent / "killed_writer.py"), str(root), str(ledger)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as nursery:
        yield nursery
        assert nursery.stdin is not None
        nursery.stdin.close()
