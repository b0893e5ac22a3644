"""Latent reads beside other formats, codecs, a trainer's wait for data, and a manifest of a million rows.

    python infra/bench/store.py [--quick] [--rows 1000000] [--peers PEERS]

One core, page cache warm, the same latents for all, readers taking turns in one run; medians. Latents are simulated:
smooth fields plus noise, (4, 76, 128, 128) float16, since real ones may not leave their site. Peers that are not
installed are left out and named, with the command that installs them into a folder of their own, PEERS. Prints tables,
then one JSON object, of a full run also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import store_rows
from store_peers import INSTALL, PACKAGES, PEERS, SHAPE, WINDOW, Reader

ROOT = Path(__file__).resolve().parents[2]
OURS = "ctpipe (crc32c checked)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 latents and 100,000 rows: under 60 s on 2 cores")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--peers", type=Path, help="folder of peers that the environment itself does not hold")
    parser.add_argument("--only", choices=("readers", "wait", "rows"), help="measure one part; keeps no result file")
    options = parser.parse_args()
    if options.peers:
        sys.path.append(str(options.peers.absolute()))
    count = 6 if options.quick else 24
    rows = options.rows or (100_000 if options.quick else 1_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {"latents": count, "shape": SHAPE, "window": WINDOW}
        if options.only in (None, "rows"):
            result["manifest"] = [store_rows.measure(Path(scratch) / f"rows{n}", n) for n in (rows // 2, rows)]
        if options.only in (None, "wait"):
            result["wait_fraction"] = wait_fraction(Path(scratch), 10 if options.quick else 100)
        if options.only in (None, "readers"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            arrays = [latent(seed) for seed in range(count)]
            result["codecs"] = codecs(arrays[0])
            result["readers"] = readers(Path(scratch), arrays, 5 if options.quick else 15)
    report(result, options.quick, keep=not (options.only or options.quick))


def latent(seed: int) -> np.ndarray:
    """A smooth field plus noise, unit scale: what a KL-trained VAE's posterior mean looks like to a compressor."""
    from scipy.ndimage import zoom

    random = np.random.default_rng(seed)
    coarse = random.normal(size=(4, 10, 16, 16)).astype(np.float32)
    smooth = np.stack([zoom(c, (7.6, 8, 8), order=1) for c in coarse])
    return (0.8 * smooth + 0.2 * random.normal(size=SHAPE).astype(np.float32)).astype(np.float16)


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
    made: dict[str, Reader] = {}
    for number, (name, make) in enumerate(PEERS.items()):
        with contextlib.suppress(ImportError):
            made[name] = make(root / f"peer{number}", arrays)
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


def wait_fraction(root: Path, steps: int) -> dict[str, float]:
    """The trainer's own stream, local and on S3: the share of time spent waiting at a batch every 100 ms."""
    sys.path.insert(0, str(ROOT / "tests"))
    from s3_server import serve

    from diffusion.made_up import make_store
    from latentcache.store import LatentStore

    with serve(root / "s3") as server:
        os.environ.update(server.environment)
        store = make_store(server.root / "store", splits=("train",) * 8, depths=(SHAPE[1],), side=SHAPE[2])
        return {"local": _wait(store, steps), "s3": _wait(LatentStore.open("s3://bucket/store"), steps)}


def _wait(store: Any, steps: int) -> float:
    """Batches of two pairs' 24-deep windows, whitened, with the default readers; a step sleeps as on a GPU."""
    from diffusion.config import DataConfig
    from diffusion.stream import PairStream

    stream = iter(PairStream(store, DataConfig(window=WINDOW, batch_size=2), samples_per_step=2))
    next(next(stream).batches)  # the first batch has nothing to hide behind
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        time.sleep(0.1)
        asked = time.perf_counter()
        for _batch in next(stream).batches:
            pass
        waited += time.perf_counter() - asked
    fraction = waited / (time.perf_counter() - began)
    stream.close()  # type: ignore[attr-defined]
    return fraction


# -- report -----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any], quick: bool, keep: bool) -> None:
    """Print the tables; with ``keep`` also write the result file."""
    for title, unit in (("readers", "whole"), ("codecs", "ratio")):
        if title in result:
            print(f"{title:28} {unit:>12} {'window' if title == 'readers' else 'decode':>12}   GB/s")
            for name, figures in result[title].items():
                print(f"{name:28}" + "".join(f" {value:12.2f}" for value in figures.values()))
            print()
    for row in result.get("manifest", []):
        print(
            f"{row['rows']:,} rows, {row['pairs']:,} pairs to train on: open {row['open_s']:.2f} s, "
            f"plan {row['plan_s']:.2f} s, find {row['find_s']:.2f} s, peak {row['peak_gib']:.2f} GiB, of which "
            f"imports {row['imports_gib']:.2f}"
        )
    if waits := result.get("wait_fraction"):
        print(f"waiting for data at a batch every 100 ms: local {waits['local']:.2%}, S3 on loopback {waits['s3']:.2%}")
    if "readers" in result:
        rates = result["readers"]
        result["absent"] = [name for name in PEERS if name not in rates]
        print(f"not installed here: {', '.join(result['absent']) or 'none'}" + f" ({INSTALL})" * bool(result["absent"]))
        result |= {f"{kind}_gb_s": rates[OURS][f"{kind}_gb_s"] for kind in ("whole", "window")}
        for name, peer in (("npy", "npy"), ("zarr_default", "zarr-python default"), ("litdata", "litdata"),
                           ("mosaicml", "mosaicml-streaming")):  # fmt: skip
            if peer in rates:
                result[f"vs_{name}"] = rates[OURS]["whole_gb_s"] / rates[peer]["whole_gb_s"]
                result[f"window_vs_{name}"] = rates[OURS]["window_gb_s"] / rates[peer]["window_gb_s"]
    result |= {
        "device": "cpu",
        "load_at_end": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: _version(name) for name in PACKAGES},
        "quick": quick,
    }
    line = json.dumps(result, sort_keys=True)
    if keep:
        out = Path(__file__).parent / "results" / "store-cpu.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(line + "\n")
    print(line)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    main()
