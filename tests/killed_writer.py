"""A writer that commits latents until it is killed; test_commit.py runs it in processes of its own."""

from __future__ import annotations

import random
from multiprocessing.connection import Connection

import numpy as np

from latentcache.records import Encoding, LatentRecord
from latentcache.store import LatentStore

ENCODING = Encoding(vae_sha256="0" * 64, vae_architecture={"channels": [8, 16]}, window_center=40, window_width=400)


def latent(key: str) -> np.ndarray:
    return np.random.default_rng(int(key, 16)).normal(size=(4, 5, 2, 2)).astype(np.float16)


def stage(store: LatentStore, key: str) -> LatentRecord:
    return store.stage(
        latent(key),
        encode_key=ENCODING.encode_key,
        key=key,
        role="thin",
        z0_mm=1.5,
        dz_mm=4.0,
        valid_zyx=(20, 8, 8),
        source_digest="d",
    )


def write_until_killed(root: str, ledger: str, seed: int, ready: Connection) -> None:
    """Commit latents one after the other, and note each in the ledger once commit has returned."""
    chance = random.Random(seed)
    ready.send(True)
    store = LatentStore.open(root)
    with store.writer() as writer, open(ledger, "a", buffering=1) as note:
        while True:
            keys = [f"{chance.getrandbits(24):016x}" for _ in range(chance.randint(1, 3))]
            for record in writer.commit([stage(store, key) for key in keys]):
                note.write(record.path + "\n")
