"""A store of very many rows, and what a trainer does with it before its first step. ``store.py`` runs this.

The rows are what an archive of pairs gives: a third each of thin, thick and thick_on_thin latents, with their catalog
(slice positions included) and pairs, in commits of 100,000 rows. No array is written.

    python infra/bench/store_rows.py STORE KEY        open STORE, plan an epoch, look KEY up: one JSON object
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
COMMIT = 100_000
THICK, DEPTHS = 60, (64, 76, 88)
"""Thick slices of every pair, and the latent depths of thin series in turn."""


def measure(root: Path, rows: int) -> dict[str, float]:
    """Write a store of ``rows`` latents; in a fresh process open it, plan an epoch and look one key up."""
    from latentcache import Encoding, LatentStore
    from latentcache.tables import Snapshot, extend, snapshot_path

    store = LatentStore.create(root, secret_fingerprint="bench")
    encode_key = store.register_encoding(Encoding("0" * 64, {}, 40, 400))
    snapshot, random, last = Snapshot(0), np.random.default_rng(0), ""
    for first in range(0, rows // 3, COMMIT // 3):
        tables, last = _tables(random, min(COMMIT // 3, rows // 3 - first), encode_key)
        snapshot = extend(store.location, snapshot, tables)
    store.location.put_once(snapshot_path(snapshot.number), [snapshot.to_json()])
    found = subprocess.run([sys.executable, __file__, str(root), last], capture_output=True, text=True, check=True)
    answer: dict[str, float] = json.loads(found.stdout)
    answer["manifest_mb"] = sum(f.size for f in snapshot.fragments["manifest"]) / 1e6
    answer["catalog_mb"] = sum(f.size for f in snapshot.fragments["catalog"]) / 1e6
    return answer


def _tables(random: np.random.Generator, n: int, encode_key: str) -> tuple[dict[Any, Any], str]:
    """Catalog, pairs and manifest rows of ``n`` pairs, and the key of the last thin series."""
    import pyarrow as pa

    from latentcache.maintenance import pair_digest
    from latentcache.tables import SCHEMAS

    def keys() -> list[str]:
        return [f"{v:016x}" for v in random.integers(0, 2**63, n)]

    def table(kind: Any, count: int, **columns: Any) -> Any:
        arrays = []
        for field in SCHEMAS[kind]:
            value = columns[field.name]
            if isinstance(value, list):
                arrays.append(pa.array(value, field.type))
            elif isinstance(value, np.ndarray) and pa.types.is_list(field.type):
                arrays.append(_lists(value.reshape(count, -1), field.type))
            elif isinstance(value, (np.ndarray, pa.Array)):
                arrays.append(pa.array(value).cast(field.type))
            else:
                arrays.append(pa.repeat(pa.scalar(value, field.type), count))
        return pa.table(arrays, schema=SCHEMAS[kind])

    thin, thick, pair, study, patient = (keys() for _ in range(5))
    split = random.choice(["train", "val", "test"], n, p=[0.75, 0.15, 0.1]).tolist()
    depth = np.resize(DEPTHS, n)
    z0 = random.integers(-3000, 3000, n) / 10
    slices = np.concatenate([4 * depth, np.full(n, THICK)]).astype(np.int32)
    z_mm = [z0[i % n] + np.arange(s) * (1.0 if i < n else 4 * DEPTHS[1] / THICK) for i, s in enumerate(slices)]
    catalog = table(
        "catalog", 2 * n, series_key=thin + thick, study_key=study * 2, patient_key=patient * 2, category="APE",
        role=["thin"] * n + ["thick"] * n, status="ok", reason="", n_slices=slices,
        shape_zyx=np.stack([slices, *[np.full(2 * n, 512, np.int32)] * 2], 1), spacing_mm_zyx=np.ones((2 * n, 3)),
        thickness_mm=1.0, affine_lps=random.normal(size=(2 * n, 16)), z_mm=_ragged(z_mm, pa.float64()), frame_key="f",
        acquisition_key="a", kernel="B", modality="CT", transfer_syntax="1.2.840.10008.1.2.1", flags=[[]] * (2 * n),
        split=split * 2, source_digest=[k * 2 for k in thin + thick],
    )  # fmt: skip
    pairs = table(
        "pairs", n, pair_key=pair, study_key=study, patient_key=patient, category="APE", thick_key=thick, thin_key=thin,
        overlap_mm=np.stack([z0 - 0.5, z0 + 4 * depth - 0.5], 1), split=split, status="ok", reason="",
        evidence=[json.dumps({"score": float(v), "overlap": 1.0, "kernel": "equal"}) for v in random.random(n)],
    )  # fmt: skip
    d = np.concatenate([depth, np.full(n, THICK // 4), depth]).astype(np.int32)
    valid = np.concatenate([4 * depth, np.full(n, THICK), 4 * depth]).astype(np.int32)
    own, both = thin + thick + pair, (thin, thick)
    role = ["thin"] * n + ["thick"] * n + ["thick_on_thin"] * n
    attempts = [f"{a:016x}{b:016x}" for a, b in random.integers(0, 2**63, (3 * n, 2))]
    manifest = table(
        "manifest", 3 * n, key=own, encode_key=encode_key, role=role, dtype="float16",
        shape=np.stack([np.full(3 * n, 4, np.int32), d, *[np.full(3 * n, 128, np.int32)] * 2], 1),
        path=[f"latents.zarr/{encode_key}/{k}/{r}/{a}" for k, r, a in zip(own, role, attempts, strict=True)],
        z0_mm=np.resize(z0, 3 * n) + 1.5, dz_mm=np.where(np.arange(3 * n) // n == 1, 20.0, 4.0),
        valid_zyx=np.stack([valid, *[np.full(3 * n, 512, np.int32)] * 2], 1),
        crc32c=_ragged([random.integers(0, 2**32, -(-n // 4), np.uint32) for n in d], pa.uint32()),
        sha256=[a * 2 for a in attempts], mean=random.normal(size=(3 * n, 4)),
        std=np.abs(random.normal(size=(3 * n, 4))) + 0.1, round_trip_psnr=[None] * (3 * n),
        source_digest=[k * 2 for k in thin + thick] + [pair_digest(k * 2, j * 2) for k, j in zip(*both, strict=True)],
    )  # fmt: skip
    return {"catalog": catalog, "pairs": pairs, "manifest": manifest}, thin[-1]


def _lists(values: np.ndarray, kind: Any) -> Any:
    return _ragged(list(values), kind.value_type)


def _ragged(rows: list[np.ndarray], item: Any) -> Any:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int32)
    kind = pa.list_(pa.field("item", item, False))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(rows)).cast(item), type=kind)


def plan_epoch_of(store_url: str, key: str) -> dict[str, float]:
    """What a training run does before its first step: open, plan an epoch of pairs, and find one row; and its peak.

    On one core, whatever the machine has.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    began = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    import pyarrow as pa

    pa.array([0])  # imports pandas, where it is installed
    from diffusion.config import DataConfig
    from diffusion.data import (
        PairStream,
        plan_epoch,  # noqa: F401 - imported here so that its import is not timed below
    )
    from latentcache import LatentStore

    imported, before, cpu = time.perf_counter(), _peak_gib(), time.process_time()
    store = LatentStore.open(store_url)
    opened = time.perf_counter()
    stream = PairStream(store, DataConfig(), samples_per_step=16)
    steps = len(stream)
    planned = time.perf_counter()
    row = store.find(key, "thin")
    found, cpu = time.perf_counter(), time.process_time() - cpu
    assert row is not None
    assert row.key == key
    first = stream.pairs[0], stream.pairs[len(stream.pairs) - 1]
    assert first[0].thin.shape[1] in DEPTHS
    return {
        "rows": store.current_snapshot.rows("manifest"),
        "pairs": len(stream.pairs),
        "steps": steps,
        "import_s": imported - began,
        "open_s": opened - imported,
        "plan_s": planned - opened,
        "find_s": found - planned,
        "total_s": found - imported,
        "cpu_s": cpu,
        "imports_gib": before,
        "peak_gib": _peak_gib(),
    }


def _peak_gib() -> float:
    """Peak resident memory of this process. Not getrusage's: that starts from the parent's peak, exec or not."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


if __name__ == "__main__":
    print(json.dumps(plan_epoch_of(*sys.argv[1:])))
