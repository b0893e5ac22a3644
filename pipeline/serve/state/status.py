"""Content of a state folder, read beside the running service or without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latentcache import InputError
from pipeline.serve.config import read_config
from pipeline.serve.state.folders import Folders
from pipeline.serve.state.queue import Queue


def state_folder(target: str) -> Path | None:
    """Return the state folder that a path names, itself or through a configuration; None where it is neither."""
    path = Path(target)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return read_config(path).state
    return path if "://" not in target and Folders(path).queue.is_file() else None


def read_status(state: Path) -> dict[str, Any]:
    """Return counts, figures and reasons; keys only.

    Raises:
        InputError: The service has never run on this folder.
    """
    folders = Folders(state)
    if not folders.queue.is_file():
        raise InputError(
            "a state folder without a queue", expected="one that `ctpipe serve` has run on", remedy="Start the service."
        )
    queue = Queue(folders.queue, read_only=True)
    try:
        return queue.summary() | {"disk_free_bytes": folders.free_bytes()}
    finally:
        queue.close()


def status_text(state: dict[str, Any]) -> str:
    """Return the same for people."""
    counters = state["counters"]

    def figure(name: str) -> int:
        return int(counters.get(name, 0))

    shown = ", ".join(f"{n} {name}" for name, n in state["studies"].items() if n) or "none"
    lines = [
        f"studies: {shown}; the oldest unfinished has waited {state['oldest_waiting_s']:.0f} s",
        f"received {figure('instances_received')} images ({figure('instances_repeated')} repeated), "
        f"{figure('associations_rejected')} associations rejected",
        f"results: {figure('results_made')} made, {figure('results_delivered')} delivered",
        f"images kept: {state['spool_bytes'] / 2**30:.2f} GiB, free {state['disk_free_bytes'] / 2**30:.1f} GiB",
    ]
    if figure("results_made"):
        lines.append(f"  {counters['interpolation_seconds'] / figure('results_made'):.1f} s each")
    if figure("results_delivered"):
        mean = counters["latency_seconds"] / figure("results_delivered")
        lines.append(f"  {mean:.1f} s from the last image to delivery")
    for name, by_state in state["deliveries"].items():
        lines.append(f"destination {name}: " + ", ".join(f"{n} {s}" for s, n in sorted(by_state.items())))
    lines += [f"{row['state']} {row['study_key']}: {row['reason']}" for row in state["quarantined"]]
    lines += [
        f"not yet at {row['destination']}: {row['study_key']}, {row['attempts']} tries: {row['reason']}"
        for row in state["undelivered"]
    ]
    return "\n".join(lines)
