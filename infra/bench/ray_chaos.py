"""A Ray cluster of several nodes on one machine, ill-treated: workers killed, a node cut off, the driver killed.

    python infra/bench/ray_chaos.py [--quick]

CPU actors stand in for GPUs, and sleeping for arithmetic, so that two cores can act as three nodes. The store, the
lease, the group commit and the engine are the real ones. Shown: every series is once in the manifest, none is lost,
and the wall time is within 1.3 times of (work lost + work).

- wall_s: from the first driver's start to the last one's end. Nothing is taken off: both drivers' start-up, the
  workers' start after each death, and the wait until a dead node is known to be dead are all in it.
- work_s, work_lost_s: what the series' own time comes to, spread over all lanes. Lost is every attempt whose series was
  committed by another one: its whole time if it ended, else the time from its start to the kill. Stage functions note
  starts and ends in files of their own; kills are noted by the one who kills.
- idle_lane_s: seconds that lanes stood idle, by what had happened last. It says what an interruption costs.

``--quick`` has ten seconds of work, which the start-up of Ray alone outlasts: it shows the first two, not the third.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentcache import Encoding, LatentMeta, LatentRecord, LatentStore
from pipeline.encode import EncodeTask
from pipeline.engines import EngineOptions, GroupCommit, Stage, StagedLatents, stream

ENCODING = Encoding(vae_sha256="0" * 64, vae_architecture={"kind": "stand-in"}, window_center=40.0, window_width=400.0)
NODES, LANES = 3, 3


@dataclass(frozen=True)
class Note:
    """Where stage functions note what they did; a file an event, so that a kill tears nothing."""

    folder: str

    def write(self, kind: str, key: str, began: float) -> None:
        name = f"{kind}-{key}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        (Path(self.folder) / name).write_text(json.dumps([began, time.time()]))


def prepare(task: EncodeTask) -> EncodeTask:
    return task


def set_up(device: str, *, url: str, notes: Note) -> tuple[LatentStore, Note]:
    (Path(notes.folder) / f"worker-{os.getpid()}").touch()
    return LatentStore.open(url), notes


def encode(state: tuple[LatentStore, Note], task: EncodeTask, *, seconds: float) -> StagedLatents:
    """Stand-in for the VAE: takes its time, then stages a real latent of the series' own bytes."""
    store, notes = state
    began = time.time()
    notes.write("start", task.name, began)
    time.sleep(seconds)
    values = np.random.default_rng(int(task.name, 16)).standard_normal((4, 2, 8, 8)).astype(np.float16)
    record = store.stage(
        values,
        LatentMeta(
            encode_key=task.encode_key,
            key=task.name,
            role="thin",
            z0_mm=0.0,
            dz_mm=4.0,
            valid_zyx=(8, 32, 32),
            source_digest=task.name,
        ),
    )
    notes.write("end", task.name, began)
    return StagedLatents(task.name, (record,))


def drive(url: str, notes: str, series: int, seconds: float, address: str) -> None:
    """The driver: what encode_store does, with the stand-in stage."""
    store = LatentStore.open(url)
    key = ENCODING.encode_key
    have = {record.key for record in store.records(key)}
    names = [f"{n:016x}" for n in range(series)]
    tasks = [EncodeTask(name, key, None, None, ()) for name in names if name not in have]
    stage: Stage[Any, Any, Any, Any] = Stage(
        prepare=prepare,
        setup=functools.partial(set_up, url=url, notes=Note(notes)),
        run=functools.partial(encode, seconds=seconds),
    )
    options = EngineOptions(name="ray", devices=("cpu",) * LANES, ray_address=address, losses=6)
    with store.writer() as writer, GroupCommit(writer, key, "cpu", lambda attempted, latents: None) as commits:
        for outcome in stream(tasks, stage, options):
            if not outcome.ok:
                print(f"set aside {outcome.item.name}: {outcome.error}", file=sys.stderr)
            commits.put(outcome)


def start_driver(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen([sys.executable, __file__, "--drive", *arguments], stdout=out, stderr=out)


def workers(notes: Path) -> list[int]:
    """Process numbers of living actors."""
    numbers = (int(path.name.split("-")[1]) for path in notes.glob("worker-*"))
    return [
        n for n in numbers if Path(f"/proc/{n}/cmdline").exists() and b"ray" in Path(f"/proc/{n}/cmdline").read_bytes()
    ]


def events(notes: Path, kind: str) -> list[tuple[str, str]]:
    return [(p.name.split("-")[1], p.name.split("-")[2]) for p in notes.glob(f"{kind}-*")]


def ended(notes: Path) -> int:
    return len({key for key, _ in events(notes, "end")})


def fresh(folder: Path) -> tuple[LatentStore, Path]:
    store = LatentStore.create(folder / "store", secret_fingerprint="0" * 16)
    store.register_encoding(ENCODING)
    notes = folder / "notes"
    notes.mkdir(parents=True)
    return store, notes


def run_chaos(cluster: Any, nodes: list[Any], root: Path, series: int, seconds: float) -> dict[str, Any]:
    """The same job with two workers killed, a node removed (another joins), and the driver killed and restarted."""
    store, notes = fresh(root / "chaos")
    arguments = [store.url, str(notes), str(series), str(seconds), cluster.address]
    log, rng = root / "chaos.log", random.Random(1)
    steps = ["worker", "node", "worker", "driver"]
    due = [series * (n + 1) // (len(steps) + 1) for n in range(len(steps))]
    marks = [("start", time.time())]
    process, drivers = start_driver(arguments, log), 1
    while True:
        code = process.poll()
        if code is not None and not steps:
            assert code == 0, log.read_text()[-2000:]
            break
        assert code is None, log.read_text()[-2000:]
        if steps and ended(notes) >= due[0]:
            step = steps.pop(0)
            due.pop(0)
            marks.append((step, time.time()))
            if step == "worker" and (alive := workers(notes)):
                os.kill(rng.choice(alive), signal.SIGKILL)
            elif step == "node":
                cluster.remove_node(nodes.pop(), allow_graceful=False)
                nodes.append(cluster.add_node(num_cpus=1))
            elif step == "driver":
                process.kill()
                process.wait()
                process, drivers = start_driver(arguments, log), drivers + 1
        time.sleep(0.05)
    marks.append(("end", time.time()))
    return {
        "wall_s": marks[-1][1] - marks[0][1],
        "drivers": drivers,
        **account(LatentStore.open(store.url), notes, series, marks),
    }


def attempts(notes: Path, marks: list[tuple[str, float]]) -> list[tuple[str, float, float]]:
    """(series, began, ended) of every attempt; one without an end ended with the next kill after its start."""
    ends = {path.name.split("-", 1)[1].rsplit("-", 1)[0]: path for path in notes.glob("end-*")}
    found = []
    for path in notes.glob("start-*"):
        who = path.name.split("-", 1)[1].rsplit("-", 1)[0]
        began = float(json.loads(path.read_text())[0])
        ended = float(json.loads(ends[who].read_text())[1]) if who in ends else next(t for _, t in marks if t >= began)
        found.append((who.split("-")[0], began, ended))
    return found


def account(store: LatentStore, notes: Path, series: int, marks: list[tuple[str, float]]) -> dict[str, Any]:
    """What the manifest holds against what was asked for, what was done in vain, and when lanes stood idle."""
    rows: list[LatentRecord] = store.records(ENCODING.encode_key)
    keys = [row.key for row in rows]
    for row in rows:
        store.read(row)  # checks the CRC
    tried = attempts(notes, marks)
    spent = sum(ended - began for _, began, ended in tried)
    # Of a series' attempts one was needed: the longest, which ran to its end.
    needed = {key: max(ended - began for k, began, ended in tried if k == key) for key in {k for k, _, _ in tried}}
    idle = {}
    for number, ((name, since), (_, until)) in enumerate(itertools.pairwise(marks)):
        busy = sum(max(0.0, min(ended, until) - max(began, since)) for _, began, ended in tried)
        idle[f"{number} {name}"] = round(LANES * (until - since) - busy, 2)
    return {
        "series": series,
        "rows": len(rows),
        "twice": len(keys) - len(set(keys)),
        "lost": series - len(set(keys)),
        "attempts": len(tried),
        "work_s": sum(needed.values()) / LANES,
        "work_lost_s": (spent - sum(needed.values())) / LANES,
        "idle_lane_s": idle,
    }


def measure(series: int, seconds: float) -> dict[str, Any]:
    import ray
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="ray-chaos-") as folder:
        root = Path(folder)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            nodes = [cluster.add_node(num_cpus=1) for _ in range(NODES - 1)]
            chaos = run_chaos(cluster, nodes, root, series, seconds)
        finally:
            cluster.shutdown()
    expected = chaos["work_s"] + chaos["work_lost_s"]
    return {
        "bench": "ray_chaos",
        "device": "cpu",
        "ray": ray.__version__,
        "python": platform.python_version(),
        "nodes": NODES,
        "lanes": LANES,
        **chaos,
        "wall_over_expected": chaos["wall_s"] / expected,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--drive", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        url, notes, series, seconds, address = options.drive
        drive(url, notes, int(series), float(seconds), address)
        return
    result = measure(series=60 if options.quick else 450, seconds=0.5 if options.quick else 1.0)
    for name, value in result.items():
        print(f"{name:22} {value}")
    if not options.quick:
        out = Path(__file__).parent / "results" / "ray_chaos-cpu.json"
        out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()
