"""Latent reads beside other formats, codecs, a trainer's wait for data, and a manifest of a million rows.

    python infra/bench/store.py [--quick] [--rows 1000000] [--peers PEERS]

One core, page cache warm, the same latents for all, readers taking turns in one run; medians. Latents are simulated:
smooth fields plus noise, (4, 76, 128, 128) float16, since real ones may not leave their site. Peers that are not
installed are left out and named, with the command that installs them into a folder of their own, PEERS. Prints tables,
then one JSON object, but for ``--quick`` also kept in infra/bench/results/; ``--only`` replaces its own part there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
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
PARTS = ("readers", "codecs", "wait", "manifest")
OURS = "ctpipe (crc32c checked)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="6 latents and 100,000 rows: under 60 s on 2 cores")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--peers", type=Path, help="folder of peers that the environment itself does not hold")
    parser.add_argument("--only", choices=("readers", "wait", "rows"), help="measure one part anew; keeps the others")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_until_told(options.serve)
        return
    if options.peers:
        sys.path.append(str(options.peers.absolute()))
    count = 6 if options.quick else 24
    rows = options.rows or (100_000 if options.quick else 1_000_000)
    with tempfile.TemporaryDirectory() as scratch:
        result: dict[str, Any] = {"latents": count, "shape": SHAPE, "window": WINDOW}
        if options.only in (None, "rows"):
            sizes = (rows // 4, rows // 2, rows)
            result["manifest"] = [store_rows.measure(Path(scratch) / f"rows{n}", n) for n in sizes]
        if options.only in (None, "wait"):
            result["wait"] = waiting(Path(scratch), 10 if options.quick else 100)
        if options.only in (None, "readers"):
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

    blocks = [np.ascontiguousarray(array[c, z : z + 4]) for c in range(4) for z in range(0, SHAPE[1], 4)]
    candidates: dict[str, Any] = {
        "blosc-lz4-bitshuffle": Blosc("lz4", 5, Blosc.BITSHUFFLE),
        "blosc-zstd3-bitshuffle": Blosc("zstd", 3, Blosc.BITSHUFFLE),
    }
    if importlib.util.find_spec("pcodec"):  # the extra `bench` brings it
        from numcodecs.pcodec import PCodec

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


def waiting(root: Path, steps: int) -> dict[str, dict[str, float]]:
    """The trainer's own stream, local and on S3, at a batch every 100 ms."""
    from diffusion.data import make_store
    from latentcache import LatentStore

    # In a process of its own: a server among the trainer's threads would make the trainer wait for the interpreter.
    command = [sys.executable, __file__, "--serve", str(root / "s3")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        served = json.loads(server.stdout.readline())
        os.environ.update(served["environment"])
        store = make_store(Path(served["root"]) / "store", splits=("train",) * 8, depths=(SHAPE[1],), side=SHAPE[2])
        try:
            away = LatentStore.open("s3://bucket/store")
            return {"local": _wait(store, steps), "s3": _wait(away, steps), "reading": _reading(store)}
        finally:
            server.stdin.close()


def _reading(store: Any) -> dict[str, float]:
    """What a reader does for such a batch, alone, ms; and float16 to float32 of one window, NumPy's way and ours."""
    from diffusion.config import DataConfig
    from diffusion.data import PairStream, widen

    half = store.read(store.records(role="thin")[0], slice(0, WINDOW))
    wide = np.empty(half.shape, np.float32)
    stream = iter(PairStream(store, DataConfig(window=WINDOW, batch_size=2, readers=0), samples_per_step=2))
    return {
        "batch_ms": median_ms(lambda: list(next(stream).batches), 40),
        "numpy_conversion_ms": median_ms(lambda: np.copyto(wide, half), 40),
        "conversion_ms": median_ms(lambda: widen(half, wide), 40),
    }


def serve_until_told(root: Path) -> None:
    """A real S3 server on loopback until standard input closes."""
    sys.path.insert(0, str(ROOT))
    from tests.support.s3_server import serve

    with serve(root) as server:
        print(json.dumps({"root": str(server.root), "environment": server.environment}), flush=True)
        sys.stdin.read()


def _wait(store: Any, steps: int) -> dict[str, float]:
    """Batches of two pairs' 24-deep windows, whitened, with the default readers; a step sleeps as on a GPU.

    Waiting is all time between asking for a batch and having it, the last batch let go meanwhile as in a trainer's
    loop; the first batch, which nothing can hide, is told apart and counted in ``with_first``. ``slower`` is by how
    much the whole loop takes longer than the same sleeps alone: what the readers take from the trainer in any other way
    would show there.
    """
    from diffusion.config import DataConfig
    from diffusion.data import PairStream

    began = time.perf_counter()
    for _ in range(steps):
        time.sleep(0.1)
    alone = time.perf_counter() - began
    stream = PairStream(store, DataConfig(window=WINDOW, batch_size=2), samples_per_step=2)
    began = time.perf_counter()
    reading = iter(stream)
    batch = next(next(reading).batches)
    first = time.perf_counter() - began
    waits = []
    began = time.perf_counter()
    for _ in range(steps):
        time.sleep(0.1)
        asked = time.perf_counter()
        for batch in next(reading).batches:  # noqa: B007 - held during the next sleep, as by a trainer
            pass
        waits.append(time.perf_counter() - asked)
    took = time.perf_counter() - began
    assert batch["thin"].shape == (2, 4, WINDOW, *SHAPE[2:])
    reading.close()  # type: ignore[attr-defined]
    return {
        "fraction": sum(waits) / took,
        "with_first": (first + sum(waits)) / (first + took),
        "slower": took / alone - 1,
        "first_ms": 1e3 * first,
        "median_ms": 1e3 * statistics.median(waits),
        "worst_ms": 1e3 * max(waits),
        "steps": steps,
        "epochs": steps / len(stream),
    }


# -- report -----------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any], quick: bool) -> None:
    """Print the tables; but for ``quick`` also write the result file, in which parts not measured now stay."""
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
    for place, wait in result.get("wait", {}).items():
        if place == "reading":
            print("a batch's reading alone: " + ", ".join(f"{name} {value:.2f}" for name, value in wait.items()))
            continue
        print(
            f"waiting for data at a batch every 100 ms, {place}: {wait['fraction']:.2%} (with the first batch "
            f"{wait['with_first']:.2%}, the whole loop longer by {wait['slower']:.2%}); "
            f"first {wait['first_ms']:.0f} ms, then median {wait['median_ms']:.2f}, worst {wait['worst_ms']:.1f} ms"
        )
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
        "load_at_end": {part: os.getloadavg()[0] for part in PARTS if part in result},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: _version(name) for name in PACKAGES},
        "quick": quick,
    }
    out = Path(__file__).parent / "results" / "store-cpu.json"
    if not quick and out.exists():
        kept = {name: value for name, value in json.loads(out.read_text()).items() if name != "wait_fraction"}
        loads = kept["load_at_end"] if isinstance(kept["load_at_end"], dict) else {}
        result["load_at_end"] = loads | result["load_at_end"]
        result = kept | result
    line = json.dumps(result, sort_keys=True)
    if not quick:
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
