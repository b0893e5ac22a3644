"""Throughput and latency of the service: studies sent by C-STORE, interpolated by a stand-in, sent on by C-STORE.

    python infra/bench/serve.py [--quick] [--studies 50] [--slices 50] [--size 512] [--senders 1 4]

Sender, service and destination are processes of one machine. The interpolation is quick (linear, no model), so that the
figures are the service's own: receiving with every image synced before it is acknowledged, queueing, writing, delivery.
Peer for receiving, where it is installed: dcmtk's storescp, which does not sync. Prints a table, then one JSON object,
which is also kept in infra/bench/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 300.0
"""Of sender and service: on a busy machine a peer's process may get no time for half a minute."""
RESULTS = Path(__file__).resolve().parent / "results"
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 studies of 12 slices, 128 x 128: under 60 s on 2 cores")
    parser.add_argument("--studies", type=int, default=50)
    parser.add_argument("--slices", type=int, default=50)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--senders", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        serve_until_stopped(*options.child)
        return
    if options.quick:
        options.studies, options.slices, options.size, options.senders = 8, 12, 128, [1, 2]
    rows = {}
    for senders in options.senders:
        files = [study(n, options.slices, options.size) for n in range(1, options.studies + 1)]
        rows[f"ctpipe, {senders} senders"] = measure_service(files, senders)
        if shutil.which("storescp"):
            rows[f"storescp, {senders} senders"] = measure_storescp(files, senders)
    report(rows, options)


def study(number: int, slices: int, size: int) -> list[bytes]:
    """One thick study as DICOM files; noise of 12 HU on a disc."""
    from tests.support.serve_site import a_study

    rng = np.random.default_rng(number)
    y, x = np.mgrid[:size, :size] / size - 0.5
    disc = np.where(x**2 + y**2 < 0.2, 40, -1000)
    image = (disc + rng.normal(0, 12, (slices, size, size))).astype(np.int16)
    return a_study(number, n=slices, image=image, pixel=400.0 / size).files()


def serve_until_stopped(state: str, port: str, pacs_port: str) -> None:
    """The service as a process of its own; quiet for a fifth of a second, no disk guard."""
    import threading
    from dataclasses import replace

    from pipeline.serve import DestinationConfig, LimitsConfig, ListenConfig, PeerConfig, Service, TimingConfig
    from tests.support.serve_site import config, quick

    settings = replace(
        config(Path(state)),
        listen=ListenConfig(host="127.0.0.1", port=int(port)),
        peers=(PeerConfig("*"),),
        destinations={"pacs": DestinationConfig(c_store=f"PACS@127.0.0.1:{pacs_port}", timeout_s=PATIENCE_S)},
        limits=LimitsConfig(min_free_gib=0.5, connections_per_minute=100_000),
        timing=TimingConfig(quiet_s=0.2),
    )
    Service(settings, quick).start()
    threading.Event().wait()


def measure_service(files: list[list[bytes]], senders: int) -> dict[str, float]:
    """Images acknowledged a second, studies delivered a second, and seconds from last image to delivery."""
    from pynetdicom import AE, evt

    from pipeline.serve import Folders, Queue, read_status
    from tests.support.serve_site import CT, EXPLICIT, free_port

    port, pacs_port = free_port(), free_port()
    entity = AE(ae_title="PACS")
    entity.add_supported_context(CT, [EXPLICIT])
    pacs = entity.start_server(("127.0.0.1", pacs_port), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda event: 0)])
    with tempfile.TemporaryDirectory() as scratch:
        state = Path(scratch) / "state"
        words = [sys.executable, __file__, "--child", str(state), str(port), str(pacs_port)]
        node = subprocess.Popen(words)
        try:
            wait_for_port(port)
            began = time.perf_counter()
            send_all(files, port, senders)
            received = time.perf_counter() - began
            while read_status(state)["studies"]["done"] < len(files):
                time.sleep(0.2)
            delivered = time.perf_counter() - began
            peak = peak_mib(node.pid)
            queue = Queue(Folders(state).queue, read_only=True)
            results = queue.results()
            queue.close()
        finally:
            node.kill()
            node.wait()
            pacs.shutdown()
    latency = [row["delivered_at"] - row["received_at"] for row in results]
    work = [row["seconds"] for row in results]
    images = sum(map(len, files))
    return {
        "images_per_s": round(images / received, 1),
        "mib_per_s": round(sum(len(data) for one in files for data in one) / received / 2**20, 1),
        "studies_per_s": round(len(files) / delivered, 3),
        "latency_s_median": round(float(np.median(latency)), 2),
        "latency_s_p95": round(float(np.percentile(latency, 95)), 2),
        "interpolation_s_median": round(float(np.median(work)), 2),
        "peak_mib": round(peak),
    }


def measure_storescp(files: list[list[bytes]], senders: int) -> dict[str, float]:
    """Images acknowledged a second by dcmtk's receiver, one process per association."""
    from tests.support.serve_site import free_port

    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        node = subprocess.Popen(["storescp", "--fork", "-od", scratch, "-aet", "CTPIPE", str(port)])
        try:
            wait_for_port(port)
            began = time.perf_counter()
            send_all(files, port, senders)
            received = time.perf_counter() - began
        finally:
            node.terminate()
            node.wait()
    size = sum(len(data) for one in files for data in one)
    return {
        "images_per_s": round(sum(map(len, files)) / received, 1),
        "mib_per_s": round(size / received / 2**20, 1),
    }


def send_all(files: list[list[bytes]], port: int, senders: int) -> None:
    from tests.support.serve_site import send

    with ThreadPoolExecutor(senders) as pool:
        for statuses in pool.map(lambda one: send(port, one, patience_s=PATIENCE_S), files):
            assert set(statuses) == {0}, statuses


def wait_for_port(port: int) -> None:
    import socket

    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise SystemExit("nobody listens")


def peak_mib(process: int) -> float:
    """The high water mark of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def report(rows: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    columns = ("images_per_s", "mib_per_s", "studies_per_s", "latency_s_median", "latency_s_p95", "peak_mib")
    print(f"{options.studies} studies of {options.slices} slices, {options.size} x {options.size}")
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
    device = f"{platform.machine()}-{os.cpu_count()}cpu"
    kept = {
        "benchmark": "serve",
        "device": device,
        "versions": {name: version(name) for name in ("pynetdicom", "pydicom", "numpy")},
        "sizes": {name: getattr(options, name) for name in ("studies", "slices", "size")},
        "rows": rows,
    }
    text = json.dumps(kept)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"serve-{device}.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
