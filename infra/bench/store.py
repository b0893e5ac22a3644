"""Latent reads beside other formats, codecs, a trainer's wait for data, and a manifest of a million rows.

    python infra/bench/store.py [--quick] [--rows 1000000]

One core, page cache warm, the same latents for all, readers taking turns in one run; medians. Latents are simulated:
smooth fields plus noise, (4, 76, 128, 128) float16, since real ones may not leave their site. Peers that are not
installed are left out and named. Prints tables, then one JSON object, also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import queue
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (4, 76, 128, 128)
WINDOW = 24
Reader = Callable[[int, slice], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 latents and 100,000 rows: under 60 s on 2 cores")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--plan", nargs=2, metavar=("STORE", "KEY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        print(json.dumps(plan_epoch_of(*options.plan)))
        return
    count = 6 if options.quick else 24
    rows = options.rows or (100_000 if options.quick else 1_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {"latents": count, "shape": SHAPE, "window": WINDOW}
        result["manifest"] = [manifest(Path(scratch) / f"rows{n}", n) for n in (rows // 2, rows)]
        result["wait_fraction"] = wait_fraction(Path(scratch), count, 10 if options.quick else 100)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        arrays = [latent(seed) for seed in range(count)]
        result["codecs"] = codecs(arrays[0])
        result["readers"] = readers(Path(scratch), arrays, 5 if options.quick else 15)
    report(result, options.quick)


def latent(seed: int) -> np.ndarray:
    """A smooth field plus noise, unit scale: what a KL-trained VAE's posterior mean looks like to a compressor."""
    from scipy.ndimage import zoom

    random = np.random.default_rng(seed)
    coarse = random.normal(size=(4, 10, 16, 16)).astype(np.float32)
    smooth = np.stack([zoom(c, (7.6, 8, 8), order=1) for c in coarse])
    return (0.8 * smooth + 0.2 * random.normal(size=SHAPE).astype(np.float32)).astype(np.float16)


def filled_store(root: Path, arrays: list[np.ndarray]) -> Any:
    from latentcache.records import Encoding
    from latentcache.store import LatentStore

    store = LatentStore.create(root, secret_fingerprint="bench")
    key = store.register_encoding(Encoding("0" * 64, {}, 40, 400))
    valid = tuple(4 * n for n in SHAPE[1:])
    with store.writer() as writer:
        for n, array in enumerate(arrays):
            row = store.stage(
                array, encode_key=key, key=f"{n:016x}", role="thin", z0_mm=0.0, dz_mm=4.0, valid_zyx=valid,
                source_digest="",
            )  # fmt: skip
            writer.commit([row])
    return store


def median_ms(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times)


# -- readers beside each other ----------------------------------------------------------------------------------------


def readers(root: Path, arrays: list[np.ndarray], rounds: int) -> dict[str, dict[str, float]]:
    """GB/s of whole latents and of 24-deep windows at random starts, each reader in turn."""
    made: dict[str, Reader] = {"ctpipe (crc32c checked)": ours(root / "ours", arrays)}
    for name, make in PEERS.items():
        with contextlib.suppress(ImportError):
            made[name] = make(root / name.split()[0], arrays)
    random = np.random.default_rng(0)
    times: dict[str, dict[str, list[float]]] = {name: {"whole": [], "window": []} for name in made}
    for name, read in made.items():
        np.testing.assert_array_equal(np.asarray(read(1, slice(3, 27))), arrays[1][:, 3:27], err_msg=name)
        for n in range(len(arrays)):
            read(n, slice(0, SHAPE[1]))
    for _ in range(rounds):
        for n in random.permutation(len(arrays)).tolist():
            start = int(random.integers(0, SHAPE[1] - WINDOW + 1))
            for name, read in made.items():
                for kind, depth in (("whole", slice(0, SHAPE[1])), ("window", slice(start, start + WINDOW))):
                    began = time.perf_counter()
                    read(n, depth)
                    times[name][kind].append(time.perf_counter() - began)
    size = {"whole": arrays[0].nbytes, "window": arrays[0].nbytes * WINDOW / SHAPE[1]}
    return {
        name: {f"{kind}_gb_s": size[kind] / statistics.median(t) / 1e9 for kind, t in kinds.items()}
        for name, kinds in times.items()
    }


def ours(root: Path, arrays: list[np.ndarray]) -> Reader:
    store = filled_store(root, arrays)
    rows = {row.key: row for row in store.records()}
    return lambda n, depth: store.read(rows[f"{n:016x}"], depth)


def npy(root: Path, arrays: list[np.ndarray]) -> Reader:
    root.mkdir()
    for n, array in enumerate(arrays):
        np.save(root / f"{n}.npy", array)

    def read(n: int, depth: slice) -> np.ndarray:
        whole = depth.stop - depth.start == SHAPE[1]
        return np.load(root / f"{n}.npy") if whole else np.load(root / f"{n}.npy", mmap_mode="r")[:, depth].copy()

    return read


def safetensors(root: Path, arrays: list[np.ndarray]) -> Reader:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    root.mkdir()
    for n, array in enumerate(arrays):
        save_file({"latent": array}, root / f"{n}.safetensors")

    def read(n: int, depth: slice) -> np.ndarray:
        with safe_open(root / f"{n}.safetensors", "np") as file:
            return np.ascontiguousarray(file.get_slice("latent")[:, depth])

    return read


def zarr_default(root: Path, arrays: list[np.ndarray]) -> Reader:
    import zarr

    opened = []
    for n, array in enumerate(arrays):
        stored = zarr.create_array(root / f"{n}", shape=array.shape, dtype=array.dtype)
        stored[:] = array
        opened.append(stored)
    return lambda n, depth: opened[n][:, depth]


def zarr_of_ours(root: Path, arrays: list[np.ndarray]) -> Reader:
    import zarr

    store = filled_store(root, arrays)
    opened = {row.key: zarr.open_array(f"{store.url}/{row.path}", mode="r") for row in store.records()}
    return lambda n, depth: opened[f"{n:016x}"][:, depth]


def zarrs_of_ours(root: Path, arrays: list[np.ndarray]) -> Reader:
    import zarr
    import zarrs  # noqa: F401

    read = zarr_of_ours(root, arrays)
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        store_rows = sorted(root.glob("latents.zarr/*/*/thin/*"))
        opened = {p.parent.parent.name: zarr.open_array(p, mode="r") for p in store_rows}
    del read
    return lambda n, depth: opened[f"{n:016x}"][:, depth]


def hdf5(root: Path, arrays: list[np.ndarray]) -> Reader:
    import h5py

    root.mkdir()
    for n, array in enumerate(arrays):
        with h5py.File(root / f"{n}.h5", "w") as file:
            file.create_dataset("latent", data=array, chunks=(4, 4, 128, 128), fletcher32=True)

    def read(n: int, depth: slice) -> np.ndarray:
        with h5py.File(root / f"{n}.h5") as file:
            return file["latent"][:, depth]

    return read


def litdata(root: Path, arrays: list[np.ndarray]) -> Reader:
    from litdata import StreamingDataset
    from litdata.streaming import Cache

    root.mkdir()
    cache = Cache(str(root), chunk_bytes="64MB")
    for n, array in enumerate(arrays):
        cache[n] = {"latent": array}
    cache.done()
    cache.merge()
    dataset = StreamingDataset(str(root))
    return lambda n, depth: dataset[n]["latent"][:, depth].copy()


def mosaic(root: Path, arrays: list[np.ndarray]) -> Reader:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(root), columns={"latent": f"ndarray:float16:{','.join(map(str, SHAPE))}"}) as writer:
        for array in arrays:
            writer.write({"latent": array})
    dataset = StreamingDataset(local=str(root), shuffle=False, batch_size=1)
    return lambda n, depth: dataset[n]["latent"][:, depth].copy()


PEERS: dict[str, Callable[[Path, list[np.ndarray]], Reader]] = {
    "npy": npy,
    "safetensors": safetensors,
    "zarr-python default": zarr_default,
    "zarr-of-ours": zarr_of_ours,
    "zarrs-of-ours": zarrs_of_ours,
    "hdf5 (chunked, fletcher32)": hdf5,
    "litdata": litdata,
    "mosaicml-streaming": mosaic,
}


# -- codecs -----------------------------------------------------------------------------------------------------------


def codecs(array: np.ndarray) -> dict[str, dict[str, float]]:
    """Size against raw, and GB/s of decoding one inner-chunk-sized block after another."""
    from numcodecs import Blosc
    from numcodecs.pcodec import PCodec

    blocks = [np.ascontiguousarray(array[c, z : z + 4]) for c in range(4) for z in range(0, SHAPE[1], 4)]
    candidates: dict[str, Any] = {
        "blosc-lz4-bitshuffle": Blosc("lz4", 5, Blosc.BITSHUFFLE),
        "blosc-zstd3-bitshuffle": Blosc("zstd", 3, Blosc.BITSHUFFLE),
    }
    if importlib.util.find_spec("pcodec"):
        candidates["pcodec"] = PCodec()
    out = np.empty_like(blocks[0])
    result = {"raw (memcpy)": {"ratio": 1.0, "decode_gb_s": _rate(lambda: [np.copyto(out, b) for b in blocks], array)}}
    for name, codec in candidates.items():
        coded = [codec.encode(b) for b in blocks]
        rate = _rate(lambda codec=codec, coded=coded: [codec.decode(c) for c in coded], array)
        result[name] = {"ratio": array.nbytes / sum(len(c) for c in coded), "decode_gb_s": rate}
    return result


def _rate(call: Callable[[], Any], array: np.ndarray) -> float:
    return array.nbytes / median_ms(call, 5) / 1e6


# -- a trainer that waits ---------------------------------------------------------------------------------------------


def wait_fraction(root: Path, count: int, steps: int) -> dict[str, float]:
    """A batch of two 24-deep windows every 100 ms, read ahead by one thread: the share of time spent waiting."""
    sys.path.insert(0, str(ROOT / "tests"))
    from s3_server import serve

    from latentcache.store import LatentStore

    with serve(root / "s3") as server:
        os.environ.update(server.environment)
        store = filled_store(server.root / "store", [latent(seed) for seed in range(count)])
        return {
            "local": _wait(store, steps),
            "s3": _wait(LatentStore.open("s3://bucket/store"), steps),
        }


def _wait(store: Any, steps: int) -> float:
    rows = store.records()
    random = np.random.default_rng(0)
    ahead: queue.Queue[list[np.ndarray]] = queue.Queue(maxsize=4)

    def produce() -> None:
        for _ in range(steps):
            chosen = random.choice(len(rows), 2)
            starts = random.integers(0, SHAPE[1] - WINDOW + 1, 2)
            ahead.put([store.read(rows[n], slice(s, s + WINDOW)) for n, s in zip(chosen, starts, strict=True)])

    threading.Thread(target=produce, daemon=True).start()
    waited, began = 0.0, time.perf_counter()
    for step in range(steps):
        asked = time.perf_counter()
        ahead.get()
        waited += time.perf_counter() - asked if step else 0.0  # the first batch has nothing to hide behind
        time.sleep(0.1)
    return waited / (time.perf_counter() - began)


# -- many rows --------------------------------------------------------------------------------------------------------


def manifest(root: Path, rows: int) -> dict[str, float]:
    """Write a manifest of ``rows`` rows; in a fresh process open it, plan an epoch and look one key up."""
    import pyarrow as pa

    from latentcache.manifest import Snapshot, extend, snapshot_path
    from latentcache.records import Encoding
    from latentcache.schema import SCHEMAS
    from latentcache.store import LatentStore

    store = LatentStore.create(root, secret_fingerprint="bench")
    encode_key = store.register_encoding(Encoding("0" * 64, {}, 40, 400))
    base = Snapshot(0)
    random = np.random.default_rng(0)
    for first in range(0, rows, 100_000):
        n = min(100_000, rows - first)
        keys = [f"{v:016x}" for v in random.integers(0, 2**63, n)]
        floats = pa.array(random.normal(size=4 * n))
        columns = {
            "key": pa.array(keys),
            "encode_key": pa.array([encode_key] * n),
            "role": pa.array(["thin"] * n),
            "shape": _lists(np.tile(SHAPE, n).astype(np.int32), 4),
            "dtype": pa.array(["float16"] * n),
            "path": pa.array([f"latents.zarr/{encode_key}/{k}/thin/{k}{k}" for k in keys]),
            "z0_mm": pa.array(random.normal(size=n)),
            "dz_mm": pa.array(np.ones(n)),
            "valid_zyx": _lists(np.tile((304, 512, 512), n).astype(np.int32), 3),
            "crc32c": _lists(random.integers(0, 2**32, 19 * n, np.uint32), 19),
            "sha256": pa.array([f"{k}{k}{k}{k}" for k in keys]),
            "mean": _lists(floats.to_numpy(), 4),
            "std": _lists(np.abs(floats.to_numpy()), 4),
            "round_trip_psnr": pa.array([None] * n, pa.float64()),
            "source_digest": pa.array(keys),
        }
        table = pa.table([columns[name] for name in SCHEMAS["manifest"].names], schema=SCHEMAS["manifest"])
        base = extend(store.location, base, {"manifest": table})
    store.location.put_once(snapshot_path(base.number), [base.to_json()])
    command = [sys.executable, __file__, "--plan", str(root), keys[-1]]
    answer: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return answer


def _lists(values: np.ndarray, length: int) -> Any:
    import pyarrow as pa

    offsets = pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32))
    item = pa.field("item", pa.from_numpy_dtype(values.dtype), False)
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=pa.list_(item))


def plan_epoch_of(store_url: str, key: str) -> dict[str, float]:
    """Open, plan an epoch (bucket by depth, shuffle) and find one row: seconds each, and peak memory."""
    began = time.perf_counter()
    sys.path.insert(0, str(ROOT))
    from latentcache.schema import matrix
    from latentcache.store import LatentStore

    imported = time.perf_counter()
    store = LatentStore.open(store_url)
    table = store.manifest_table(("encode_key", "key", "role", "shape"))
    opened = time.perf_counter()
    depth = matrix(table, "shape")[:, 1]
    order = np.random.default_rng(0).permutation(table.num_rows)
    buckets = np.split(order[np.argsort(depth[order], kind="stable")], np.flatnonzero(np.diff(np.sort(depth))) + 1)
    planned = time.perf_counter()
    row = store.find(key, "thin")
    found = time.perf_counter()
    assert row is not None
    assert row.key == key
    return {
        "rows": table.num_rows,
        "import_s": imported - began,
        "open_s": opened - imported,
        "plan_s": planned - opened,
        "find_s": found - planned,
        "total_s": found - imported,
        "buckets": len(buckets),
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


# -- report -----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any], quick: bool) -> None:
    readers_ = result["readers"]
    mine = readers_["ctpipe (crc32c checked)"]
    print(f"{'reader':28} {'whole GB/s':>11} {'window GB/s':>12}")
    for name, rates in readers_.items():
        print(f"{name:28} {rates['whole_gb_s']:11.2f} {rates['window_gb_s']:12.2f}")
    absent = [name for name in PEERS if name not in readers_]
    print(f"not installed here: {', '.join(absent) or 'none'}\n")
    print(f"{'codec':28} {'ratio':>11} {'decode GB/s':>12}")
    for name, figures in result["codecs"].items():
        print(f"{name:28} {figures['ratio']:11.3f} {figures['decode_gb_s']:12.2f}")
    for row in result["manifest"]:
        print(
            f"\n{row['rows']:,} rows: open {row['open_s']:.2f} s, plan {row['plan_s']:.2f} s, "
            f"find {row['find_s']:.2f} s, peak {row['peak_gib']:.2f} GiB"
        )
    waits = result["wait_fraction"]
    print(f"\nwaiting for data at a batch every 100 ms: local {waits['local']:.2%}, S3 on loopback {waits['s3']:.2%}\n")
    result |= {
        "absent": absent,
        "whole_gb_s": mine["whole_gb_s"],
        "window_gb_s": mine["window_gb_s"],
        "vs_npy": mine["whole_gb_s"] / readers_["npy"]["whole_gb_s"],
        "vs_zarr_default": mine["whole_gb_s"] / readers_["zarr-python default"]["whole_gb_s"],
        "device": "cpu",
        "load_at_end": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: _version(name) for name in ("numpy", "zarr", "pyarrow", "google-crc32c", "obstore")},
        "quick": quick,
    }
    out = Path(__file__).parent / "results" / "store-cpu.json"
    out.parent.mkdir(exist_ok=True)
    line = json.dumps(result, sort_keys=True)
    out.write_text(line + "\n")
    print(line)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
