"""A writer that commits latents until it is killed, forked from a process that has done its imports.

test_commit.py runs it as ``python killed_writer.py STORE LEDGER``: every line on stdin is a seed and starts a writer,
whose process number is answered; the next line is answered once that writer is dead. It never imports torch.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentcache import Encoding, LatentMeta, LatentRecord, LatentStore
from latentcache.storage import FileSystem, LocalLocation

ENCODING = Encoding(vae_sha256="0" * 64, vae_architecture={"channels": [8, 16]}, window_center=40, window_width=400)


class QuickDisk(FileSystem):
    """No fsync: a killed process loses nothing that the kernel holds, and these tests kill no kernel."""

    def write(self, path: Path, buffers: Sequence[Any]) -> None:
        with open(path, "xb", buffering=0) as file:
            for buffer in buffers:
                file.write(memoryview(buffer).cast("B"))

    def fsync_folder(self, path: Path) -> None:
        assert path.is_dir()


def latent(key: str) -> np.ndarray:
    return np.random.default_rng(int(key, 16)).normal(size=(4, 5, 2, 2)).astype(np.float16)


def stage(store: LatentStore, key: str) -> LatentRecord:
    return store.stage(
        latent(key),
        LatentMeta(
            encode_key=ENCODING.encode_key,
            key=key,
            role="thin",
            z0_mm=1.5,
            dz_mm=4.0,
            valid_zyx=(20, 8, 8),
            source_digest="d",
        ),
    )


def write_until_killed(root: str, ledger: str, seed: int) -> None:
    """Commit latents one after the other, and note each in the ledger once commit has returned."""
    chance = random.Random(seed)
    store = LatentStore.open(LocalLocation(Path(root), QuickDisk()))
    with store.writer() as writer, open(ledger, "a", buffering=1) as note:
        while True:
            keys = [f"{chance.getrandbits(24):016x}" for _ in range(chance.randint(1, 3))]
            for record in writer.commit([stage(store, key) for key in keys]):
                note.write(record.path + "\n")


def main() -> None:
    """Fork a writer for every seed. pyarrow looks for pandas at its first array: a third of a second, once, here."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pandas")
    assert "torch" not in sys.modules
    for line in sys.stdin:
        writer = os.fork()
        if writer == 0:
            try:
                write_until_killed(sys.argv[1], sys.argv[2], int(line))
            finally:
                os._exit(1)
        print(writer, flush=True)
        _, status = os.waitpid(writer, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -1, flush=True)


if __name__ == "__main__":
    main()
