"""What the engine costs and what it holds: scaling, overhead, memory, and a job of a million series.

    python infra/bench/engine.py [--quick]

- scaling_1_to_2: real encode of phantoms by the tiny VAE, one single-threaded worker against two, on Ray (processes)
  and by embedded dask (threads); the better of the two is the ratio that the design asks for, both are kept. Seconds of
  the stage (read and encode) of one pair are ``encode_stage_s``.
- overhead_fraction: the worse of dask and Ray, over a stage that sleeps 0.1 s, which is short for a series;
  ``overhead_fraction_1s`` the same over 1 s. It is the time in which a worker that has begun does not work, until its
  last item. Starting Ray and its workers is not in it: that is paid once a job, and is ``ray_start_s``.
- object_store_peak_mib: of Ray, while 1,000 queued series of 4 MiB each pass through two workers.
- driver_growth_mib: resident memory of the driver between a tenth and the whole of 100,000 simulated series, by
  embedded dask; driver_growth_ray_mib the same on Ray.
- million_per_s: simulated series through scheduler, group commit and manifest of a real store. Their stage functions
  hand in one real latent's row under new keys, at once: what is measured is what the driver can take. ray_per_s is the
  same on Ray (fewer series, from the first result on), where each series is two remote calls. driver_bytes_a_row is
  what the driver grew by a series over the second half.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from latentcache import Encoding, LatentMeta, LatentRecord, LatentStore
from pipeline.encode import EncodeSettings, EncodeTask, encode_store
from pipeline.engines import EngineName, EngineOptions, GroupCommit, Stage, StagedLatents, stream
from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.phantom import write_dataset

ENCODING = Encoding(vae_sha256="0" * 64, vae_architecture={"kind": "stand-in"}, window_center=40.0, window_width=400.0)
MIB = 1 << 20


def same(item: Any) -> Any:
    return item


def no_state(device: str) -> str:
    return device


def nap(state: str, item: Any, *, seconds: float) -> tuple[str, float, float]:
    """Who napped, from when to when: on Linux the monotonic clock is one for all processes."""
    began = time.monotonic()
    time.sleep(seconds)
    return f"{os.getpid()}-{state}", began, time.monotonic()


def big(item: int) -> Any:
    return np.full(4 * MIB, item % 251, np.uint8)


def total(state: str, volume: Any) -> int:
    return int(volume[::4096].sum())


def scaling(patients: int, size: int) -> dict[str, float]:
    """Seconds of encode with one and two workers. Starting up is not counted: the clock runs between results."""
    start_ray()
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as folder:
        root = Path(folder)
        write_dataset(root / "data", patients=patients, size=size, n_thin=44)
        store, private = open_stores(str(root / "store"))
        ingest(str(root / "data"), store, private, IngestOptions())
        settings = EncodeSettings(torch_threads=1, reader_threads=1, round_trip_fraction=0.0)
        found = {}
        for engine in ("dask", "ray"):
            seconds = {}
            for workers in (1, 2):
                copy = root / f"{engine}{workers}"
                shutil.copytree(root / "store", copy)
                ticks: list[float] = []
                stages: list[float] = []
                options = EngineOptions(name=engine, devices=("cpu",) * workers, prefetch=1)
                encode_store(
                    str(copy),
                    settings,
                    options,
                    on_outcome=lambda outcome, planned, t=ticks, s=stages: (
                        t.append(time.monotonic()),
                        s.append(sum(outcome.seconds.values())),
                    ),
                )
                # Both clocks start at the first result of each worker, and so span the same kind of work.
                seconds[workers] = (ticks[-1] - ticks[workers - 1]) / (len(ticks) - workers)
                found[f"encode_stage_s_{engine}"] = statistics.median(stages)
            found[f"scaling_1_to_2_{engine}"] = seconds[1] / seconds[2]
        return {**found, "scaling_1_to_2": max(value for name, value in found.items() if name.startswith("scaling"))}


def start_ray() -> None:
    import ray

    if not ray.is_initialized():
        os.environ.setdefault("RAY_worker_niceness", "0")  # else they stand behind whatever else this machine does
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=40)


def idle_fraction(naps: list[tuple[str, float, float]]) -> float:
    """Time between a worker's naps over the time of its naps, all workers together."""
    idle = busy = 0.0
    for worker in {who for who, _, _ in naps}:
        own = sorted(nap[1:] for nap in naps if nap[0] == worker)
        took = sum(end - began for began, end in own)
        busy += took
        idle += own[-1][1] - own[0][0] - took
    return idle / busy


def overhead(items: int, seconds: float) -> dict[str, float]:
    """Time that workers spend between two series, as a fraction of the time that they spend on series."""
    start_ray()
    found = {}
    for engine in ("dask", "ray"):
        options = EngineOptions(name=engine, devices=("a", "b"))
        asked = time.monotonic()
        stage = Stage(same, no_state, functools.partial(nap, seconds=seconds))
        outcomes = list(stream(range(items), stage, options))
        naps = [outcome.value for outcome in outcomes if outcome.value is not None]
        assert len(naps) == items
        assert len({who for who, _, _ in naps}) == 2
        found[f"overhead_fraction_{engine}"] = idle_fraction(naps)
        if engine == "ray":
            found["ray_start_s"] = min(began for _, began, _ in naps) - asked
    return {**found, "overhead_fraction": max(value for name, value in found.items() if "fraction" in name)}


def overheads(quick: bool) -> dict[str, float]:
    short = overhead(40 if quick else 200, 0.1)
    long = overhead(10 if quick else 60, 1.0)
    return {**short, **{f"{name}_1s": value for name, value in long.items() if "fraction" in name}}


def object_store(items: int) -> dict[str, float]:
    """Peak of Ray's object store. Its level is what the cluster's own accounting says is not available."""
    import ray

    start_ray()
    stage = Stage(big, no_state, total)
    peak = 0.0
    whole = ray.cluster_resources()["object_store_memory"]
    for n, outcome in enumerate(stream(range(items), stage, EngineOptions(name="ray", devices=("cpu", "cpu")))):
        assert outcome.ok
        if n % 5 == 0:
            peak = max(peak, whole - ray.available_resources().get("object_store_memory", whole))
    return {"object_store_queued": items, "object_store_queued_mib": items * 4.0, "object_store_peak_mib": peak / MIB}


def driver_memory(items: int) -> dict[str, float]:
    """What the engine's driver holds on to. The first tenth fills pools and loads what is loaded once."""
    found: dict[str, float] = {"driver_series": items}
    spread: tuple[tuple[EngineName, str], ...] = (("dask", ""), ("ray", "_ray"))
    for name, suffix in spread:
        if name == "ray":
            start_ray()
        process, early = psutil.Process(), 0
        options = EngineOptions(name=name, devices=("a", "b"), prefetch=4)
        for number, _ in enumerate(stream(range(items), Stage(same, no_state, hand_back), options), 1):
            if number == items // 10:
                early = process.memory_info().rss
        found[f"driver_growth{suffix}_mib"] = (process.memory_info().rss - early) / MIB
    return found


def hand_back(state: str, item: int) -> int:
    return item


def hand_in(state: str, task: EncodeTask, *, record: LatentRecord) -> StagedLatents:
    return StagedLatents(task.name, (replace(record, key=task.name, source_digest=task.name),), seconds={"vae": 1.0})


def simulated(series: int, options: EngineOptions) -> dict[str, float]:
    """A job whose stage functions do nothing, through the engine, group commit and a real store's manifest."""
    with tempfile.TemporaryDirectory(prefix="engine-bench-") as folder:
        store = LatentStore.create(Path(folder) / "store", secret_fingerprint="0" * 16)
        key = store.register_encoding(ENCODING)
        latent = np.random.default_rng(0).standard_normal((4, 2, 8, 8)).astype(np.float16)
        record = store.stage(
            latent,
            LatentMeta(
                encode_key=key, key="f" * 16, role="thin", z0_mm=0.0, dz_mm=4.0, valid_zyx=(8, 32, 32), source_digest=""
            ),
        )
        tasks: Iterator[EncodeTask] = (EncodeTask(f"{n:016x}", key, None, None, ()) for n in range(series))
        stage = Stage(same, no_state, functools.partial(hand_in, record=record))
        process, began, rss = psutil.Process(), 0.0, 0
        with store.writer() as writer, GroupCommit(writer, key, "cpu", lambda attempted, latents: None) as commits:
            for number, outcome in enumerate(stream(tasks, stage, options)):
                began = began or time.monotonic()  # workers have started: that is paid once, whatever the job
                rss = process.memory_info().rss if number == series // 2 else rss
                commits.put(outcome)
        seconds = time.monotonic() - began
        grown = process.memory_info().rss - rss
        counted = LatentStore.open(store.url).manifest_table(("key",)).num_rows
        assert counted == series == commits.committed
        return {
            "series": series,
            "s": seconds,
            "per_s": series / seconds,
            "snapshots": LatentStore.open(store.url).snapshot,
            "driver_bytes_a_row": grown / (0.5 * series),
        }


def million(series: int) -> dict[str, float]:
    found = simulated(series, EngineOptions(devices=("a",) * 8))
    return {f"million_{name}": value for name, value in found.items()}


def on_ray(series: int) -> dict[str, float]:
    start_ray()
    found = simulated(series, EngineOptions(name="ray", devices=("cpu",) * 4, prefetch=4))
    return {f"ray_{name}": value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--series", type=int, default=1_000_000, help="of the simulated job; a million takes minutes")
    parser.add_argument("--only", help="one part: scaling, overhead, on_ray, object_store, driver_memory or million")
    options = parser.parse_args()
    quick = options.quick
    parts = {
        "million": lambda: million(5_000 if quick else options.series),
        "driver_memory": lambda: driver_memory(5_000 if quick else 100_000),
        "overhead": lambda: overheads(quick),
        "on_ray": lambda: on_ray(500 if quick else 30_000),
        "object_store": lambda: object_store(100 if quick else 1_000),
        "scaling": lambda: scaling(6 if quick else 16, 64 if quick else 128),
    }
    import ray

    out = Path(__file__).parent / "results" / "engine-cpu.json"
    result: dict[str, Any] = {
        "bench": "engine",
        "device": "cpu",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "ray": ray.__version__,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            result[f"load_before_{name}"] = os.getloadavg()[0]
            result.update(part())
    for name, value in result.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if not quick:
        if options.only and out.exists():  # one part alone renews its own figures and keeps the others'
            result = {**json.loads(out.read_text()), **result}
        out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()
