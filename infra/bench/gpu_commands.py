"""The row `commands` of gpu.py: every command on phantoms, from the archive to thin DICOM, as a user would type them.

In this process, so that libraries are loaded once; on a GPU, training that a SIGTERM ends runs in one of its own. The
memory that a command took is read off the device, all processes together.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cli.main import app

Say = Callable[..., None]
NARROW = (
    "model.width=8", "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.groups=4", "model.heads=2",
    "model.time_embedding=16", "images_every=0", "data.window=4", "data.windows_per_volume=1", "data.batch_size=1",
    "optimiser.samples_per_step=1", "validation.every_epochs=0",
)  # fmt: skip


def commands(device: torch.device, small: bool, say: Say) -> None:
    """One after the other; the first that fails ends the row, since the next would need what it makes."""
    with tempfile.TemporaryDirectory() as folder:
        run_all(Path(folder), device, small, say)
    say(end_to_end_ok=True)


def run_all(root: Path, device: torch.device, small: bool, say: Say) -> None:
    say(end_to_end_ok=False)
    archive, store, run = root / "archive", root / "store", root / "run"
    size, slices = ("32", "36") if small else ("256", "120")
    on = ["--gpus", "1"] if not small else ["--engine", "inline"]
    where = ["--device", device.type]
    alone = ["--workers", 1] if small else []
    one_thread = ["--threads", 1]  # two that wait for each other on a busy machine take ten times as long
    run_one = Runner(device, say)
    run_one("phantom", archive, "--patients", 4, "--size", size, "--thin-slices", slices)
    run_one("ingest", archive, store, *alone)
    run_one("encode", store, "--vae", "tiny", *on, *one_thread)
    sets = NARROW if small else ("batch_size=1",)
    train = [store, run, "--preset", "tiny" if small else "medium", *(w for s in sets for w in ("--set", s)),
             "--gpus", 0 if small else 1]  # fmt: skip
    planned = run_one("train", *train, "--dry-run")
    run_one("train", *train, "--max-steps", 2 if small else 40, predicted=predicted(planned))
    stopped_by_a_signal(root, train, small, say)
    run_one("train", *train[:2], "--resume", "--gpus", 0 if small else 1, "--max-steps", 3 if small else 45)
    sampled = ["--checkpoint", run, "--split", "test", "--steps", 1]
    run_one("decode", store, root / "dicom", "--to-dicom", *sampled, *on, *one_thread)
    run_one("evaluate", store, run, "--split", "test", "--steps", 1, "--limit", 1, *where, *one_thread)
    patch = ["--patch", "8,16,16", "--batch", 2, "--width", 4, "--blocks", 1] if small else []
    steps = ["--steps", 2 if small else 20, "--sampling-steps", 1]
    run_one("train-refiner", store, root / "refiner", "--checkpoint", run, *patch, *steps, *where)
    thick = sorted(archive.rglob("*.zip"))[0]
    run_one("interpolate", thick, root / "thin", "--checkpoint", run, "--steps", 1, *where)
    run_one("selftest", "--preset", "tiny", *(w for s in (NARROW if small else ()) for w in ("--set", s)))


class Runner:
    """Runs a command and says how long it took and what memory."""

    def __init__(self, device: torch.device, say: Say) -> None:
        self.device, self.say = device, say

    def __call__(self, name: str, *words: Any, predicted: float | None = None) -> dict[str, Any]:
        begin = time.perf_counter()
        out = io.StringIO()
        key = name.replace("-", "_")
        with Watch(self.device) as watch, contextlib.redirect_stdout(out):
            code = app([name, *map(str, words), "--json"], standalone_mode=False)
        if code not in (None, 0):
            raise SystemExit(f"{name} ended with {code}: {out.getvalue()[-300:]}")
        figures: dict[str, Any] = {f"command_{key}_s": round(time.perf_counter() - begin, 2)}
        if watch.peak:
            figures[f"command_{key}_peak_gib"] = round(watch.peak, 2)
            if predicted:
                figures["predicted_over_peak"] = round(predicted / watch.peak, 2)
        self.say(**figures)
        lines = [line for line in out.getvalue().splitlines() if line.startswith("{")]
        return dict(json.loads(lines[-1])) if lines else {}


class Watch:
    """The most memory in use on a GPU while it watches, above what was in use before, in GiB; 0 on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self.over = device, 0.0, threading.Event()

    def __enter__(self) -> Watch:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.before = torch.cuda.mem_get_info()[0]
            self.thread = threading.Thread(target=self._look, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.device.type == "cuda":
            self.thread.join()

    def _look(self) -> None:
        while not self.over.wait(0.05):
            self.peak = max(self.peak, (self.before - torch.cuda.mem_get_info()[0]) / 2**30)


def predicted(plan: dict[str, Any]) -> float | None:
    """GiB that the dry run says a step takes, under whichever name."""
    for key in ("peak_gib", "memory_gib", "step_gib"):
        if isinstance(plan.get(key), int | float):
            return float(plan[key])
    need = plan.get("estimate") or plan.get("need") or {}
    peak = need.get("peak_bytes") or plan.get("peak_bytes")
    return None if peak is None else float(peak) / 2**30


def stopped_by_a_signal(root: Path, train: list[Any], small: bool, say: Say) -> None:
    """SIGTERM once the first step is logged: the run ends well and has a checkpoint that can be resumed."""
    run = root / "stopped"
    words = [str(w) for w in (train[0], run, *train[2:], "--set", "log_every_steps=1", "--json")]
    begin = time.perf_counter()
    log = run / "log.jsonl"
    ended = trained_here(words, log) if small else trained_elsewhere(words, log)
    text = log.read_text() if log.exists() else ""
    if ended or '"signal"' not in text:
        raise SystemExit(f"train after SIGTERM: {ended or 'it did not stop for it'}")
    say(command_sigterm_s=round(time.perf_counter() - begin, 2))


def a_step_is_logged(log: Path) -> bool:
    return '"train"' in (log.read_text() if log.exists() else "")


def trained_elsewhere(words: list[str], log: Path) -> str:
    """Train in a process of its own, as a cluster would stop it; what was wrong with its end, or nothing."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "train", *words],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    while process.poll() is None and not a_step_is_logged(log):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    return f"exit {process.returncode}: {errors[-300:]}" if process.returncode else ""


def trained_here(words: list[str], log: Path) -> str:
    """Train in this process, which sends the signal to itself: a start less."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(0.05):
            if a_step_is_logged(log):
                os.kill(os.getpid(), signal.SIGTERM)
                return

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            code = app(["train", *words], standalone_mode=False)
    finally:
        over.set()
        sender.join()
    return f"exit {code}" if code else ""
