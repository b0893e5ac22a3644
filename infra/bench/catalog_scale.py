"""A catalog of 1,000,000 series: re-ingest of unchanged archives, and what is left to encode. Seconds and peak memory.

    python infra/bench/catalog_scale.py [--quick] [--series 1000000]

The store and its private part are simulated, files and all: a third as many archives as series, each with a thick
series of 54 slices, a thin one of 306 and a scout; half the latents are in the manifest. Then, each in a process of its
own: a genuine `ingest` of the unchanged archives, in which opening any archive is an error, and the plan of missing
latents. Prints a table, then one JSON object, which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

ROOT = Path(__file__).resolve().parents[2]
THICK, THIN = 54, 306
PER_ARCHIVE = 3
CHUNK = 20_000
"""Archives a fragment."""
SECRET = "0" * 64
ENCODE_KEY = "e" * 16
LIMIT_GIB = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30,000 series: under 60 s on 2 cores")
    parser.add_argument("--series", type=int, default=1_000_000)
    parser.add_argument("--child", nargs=3, metavar=("STEP", "STORE", "ARCHIVES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["CTPIPE_SECRET"] = SECRET
    if options.child:
        step, store, archives = options.child
        print(json.dumps({"ingest": _reingest, "plan": _plan}[step](store, int(archives))))
        return
    archives = (30_000 if options.quick else options.series) // PER_ARCHIVE
    with tempfile.TemporaryDirectory() as scratch:
        store = f"{scratch}/store"
        started = time.perf_counter()
        _simulate(store, archives)
        made = time.perf_counter() - started
        size = sum(f.stat().st_size for f in Path(store).rglob("*") if f.is_file())
        steps = {step: _child(step, store, archives) for step in ("ingest", "plan")}
    _report(steps, archives, made, size, options.quick)


def _child(step: str, store: str, archives: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", step, store, str(archives)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return measured


def _peak_gib() -> float:
    """Peak resident memory of this process alone; ru_maxrss would carry over the parent's through exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


class _Clock:
    """Wall and CPU seconds since it was made: on a busy machine only the second says much."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._wall, "cpu_s": time.process_time() - self._cpu}


def _found(index: int) -> Any:
    from pipeline.archive import FoundArchive

    category = "APE" if index % 3 == 0 else "non-APE"
    return FoundArchive(f"/archive/{category}/patient_{index:07d}.zip", 10**8 + index, 10**18 + index, "", category)


def _reingest(store_url: str, archives: int) -> dict[str, Any]:
    """A genuine ingest of archives of which none has changed."""
    from pipeline.ingest import IngestOptions, ingest, ingest as module, open_stores, scan as ingest_scan

    found = [_found(i) for i in range(archives)]  # what listing the dataset would give; not timed
    opened: list[str] = []
    with (
        mock.patch.object(module, "stream_archives", return_value=iter(found)),
        mock.patch.object(ingest_scan, "open_archive", side_effect=opened.append),
    ):
        clock = _Clock()
        store, private = open_stores(store_url)
        summary = ingest("/archive", store, private, IngestOptions())
        times = clock.read()
    assert summary.archives == {"unchanged": archives}
    assert summary.pairs == archives
    return {**times, "peak_gib": _peak_gib(), "opened": len(opened)}


def _plan(store_url: str, archives: int) -> dict[str, Any]:
    """What is left to encode."""
    from latentcache import LatentStore
    from pipeline.encode import missing_latents

    clock = _Clock()
    left = missing_latents(LatentStore.open(store_url), ENCODE_KEY)
    times = clock.read()
    assert len(left) == archives - archives // 2
    return {**times, "peak_gib": _peak_gib(), "tasks": len(left)}


def _simulate(store_url: str, archives: int) -> None:
    from latentcache import LatentStore
    from latentcache.tables import extend
    from pipeline.identity import PrivateStore

    private = PrivateStore.open(store_url, create=True)
    store = LatentStore.create(store_url, secret_fingerprint=private.fingerprint)
    for first in range(0, archives, CHUNK):
        index = np.arange(first, min(first + CHUNK, archives))
        tables = {"catalog": _catalog(index), "pairs": _pairs(index), "manifest": _manifest(index, archives // 2)}
        with store.writer() as writer:
            writer.replace(lambda base, t=tables: extend(store.location, base, t))
        private.add_archives([_archive_row(int(i), private) for i in index])


def _keys(prefix: str, index: np.ndarray[Any, Any]) -> pa.Array:
    return pa.array([f"{prefix}{i:015x}" for i in index], pa.string())


def _split(index: np.ndarray[Any, Any]) -> list[str]:
    return ["test" if i % 10 == 0 else "val" if i % 20 < 3 else "train" for i in index]


def _archive_row(i: int, private: Any) -> Any:
    from pipeline.identity import ArchiveRow

    f = _found(i)
    keys = tuple(f"{kind}{i:015x}" for kind in "abc")
    return ArchiveRow(
        private.keys.archive(f.url), f.url, f.size, f.mtime_ns, "", f"{i:032x}", "ok", "", f.category, keys
    )


def _catalog(index: np.ndarray[Any, Any]) -> pa.Table:
    """Three rows an archive, positions of their own for every series."""
    from latentcache.tables import SCHEMAS

    n = len(index)
    rng = np.random.default_rng(int(index[0]))
    parts = []
    for kind, role, slices, spacing in (("a", "thick", THICK, 5.0), ("b", "thin", THIN, 1.0), ("c", "other", 0, 0.0)):
        z = rng.uniform(-500, 500, (n, 1)) + spacing * np.arange(slices)
        affine = np.tile(np.eye(4).ravel(), (n, 1))
        affine[:, 11] = z[:, 0] if slices else 0.0
        columns = {
            "series_key": _keys(kind, index),
            "study_key": _keys("d", index),
            "patient_key": _keys("f", index),
            "category": ["APE" if i % 3 == 0 else "non-APE" for i in index],
            "role": [role] * n,
            "status": ["ok"] * n,
            "reason": ["" if slices else "a localizer"] * n,
            "n_slices": [max(slices, 1)] * n,
            "shape_zyx": [[slices, 512, 512]] * n,
            "spacing_mm_zyx": [[spacing, 0.7, 0.7]] * n,
            "thickness_mm": [spacing] * n,
            "affine_lps": _lists(affine),
            "z_mm": _lists(z),
            "frame_key": _keys("9", index),
            "acquisition_key": _keys("8", index),
            "kernel": ["B30f"] * n,
            "modality": ["CT"] * n,
            "transfer_syntax": ["1.2.840.10008.1.2.1"] * n,
            "flags": [[]] * n,
            "split": _split(index),
            "source_digest": _keys("7", index),
        }
        schema = SCHEMAS["catalog"]
        parts.append(pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema))
    return pa.concat_tables(parts)


def _lists(values: np.ndarray[Any, Any]) -> pa.Array:
    width = values.shape[1]
    offsets = pa.array(np.arange(len(values) + 1) * width, pa.int32())
    kind = pa.list_(pa.field("item", pa.float64(), False))
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()), type=kind)


def _pairs(index: np.ndarray[Any, Any]) -> pa.Table:
    from latentcache.tables import SCHEMAS

    n = len(index)
    columns = {
        "pair_key": _keys("6", index),
        "study_key": _keys("d", index),
        "patient_key": _keys("f", index),
        "category": ["APE" if i % 3 == 0 else "non-APE" for i in index],
        "thick_key": _keys("a", index),
        "thin_key": _keys("b", index),
        "overlap_mm": [[0.0, 270.0]] * n,
        "split": _split(index),
        "evidence": ['{"chosen_by": "score", "candidates": []}'] * n,
        "status": ["ok"] * n,
        "reason": [""] * n,
    }
    schema = SCHEMAS["pairs"]
    return pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema)


def _manifest(index: np.ndarray[Any, Any], encoded: int) -> pa.Table:
    """The latents of the first half of the archives: thin, thick and thick_on_thin."""
    from latentcache.tables import SCHEMAS

    index = index[index < encoded]
    n = len(index)
    schema = SCHEMAS["manifest"]
    parts = []
    for kind, role, depth in (("b", "thin", 77), ("a", "thick", 14), ("6", "thick_on_thin", 77)):
        columns = {
            "key": _keys(kind, index),
            "encode_key": [ENCODE_KEY] * n,
            "role": [role] * n,
            "shape": [[4, depth, 128, 128]] * n,
            "dtype": ["float16"] * n,
            "path": [f"latents.zarr/{ENCODE_KEY}/{kind}{i:015x}/{role}/{i:032x}" for i in index],
            "z0_mm": [0.0] * n,
            "dz_mm": [4.0] * n,
            "valid_zyx": [[4 * depth, 512, 512]] * n,
            "crc32c": [[1] * 8] * n,
            "sha256": [f"{i:064x}" for i in index],
            "mean": [[0.0] * 4] * n,
            "std": [[1.0] * 4] * n,
            "round_trip_psnr": [None] * n,
            "source_digest": _keys("7", index),
        }
        parts.append(pa.table([pa.array(columns[f.name], f.type) for f in schema], schema=schema))
    return pa.concat_tables(parts)


def _report(steps: dict[str, dict[str, Any]], archives: int, made: float, size: int, quick: bool) -> None:
    series = archives * PER_ARCHIVE
    print(f"{series:,} series in {archives:,} archives ({size / 2**30:.2f} GiB of tables, made in {made:.0f} s)")
    print(f"{'step':<22}{'seconds':>9}{'CPU s':>8}{'peak GiB':>10}")
    for name, step in (("re-ingest, unchanged", "ingest"), ("plan what is left", "plan")):
        one = steps[step]
        print(f"{name:<22}{one['seconds']:>9.1f}{one['cpu_s']:>8.1f}{one['peak_gib']:>10.2f}")
    print(f"archives opened: {steps['ingest']['opened']}; tasks left: {steps['plan']['tasks']:,}")
    result = {
        "bench": "catalog_scale",
        "quick": quick,
        "series": series,
        "archives": archives,
        "archives_opened": steps["ingest"]["opened"],
        "reingest_s": round(steps["ingest"]["seconds"], 2),
        "reingest_cpu_s": round(steps["ingest"]["cpu_s"], 2),
        "reingest_peak_gib": round(steps["ingest"]["peak_gib"], 3),
        "plan_s": round(steps["plan"]["seconds"], 2),
        "plan_cpu_s": round(steps["plan"]["cpu_s"], 2),
        "plan_peak_gib": round(steps["plan"]["peak_gib"], 3),
        "within_2_gib": max(steps[s]["peak_gib"] for s in steps) < LIMIT_GIB,
        "device": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "pyarrow": version("pyarrow"),
        "numpy": version("numpy"),
    }
    text = json.dumps(result, sort_keys=True)
    if not quick:
        folder = ROOT / "infra" / "bench" / "results"
        folder.mkdir(exist_ok=True)
        (folder / "catalog_scale-cpu.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
