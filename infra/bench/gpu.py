"""Everything that only a GPU can show, in one command: is it right, does every command run, how fast.

    python infra/bench/gpu.py [--seconds 420] [--rows correctness,vae,...] [--keep DIRECTORY]
    python infra/bench/gpu.py --cpu            every row at a small size, within 60 s on 2 cores

Rows run in order of worth, each in a process of its own with a limit of its own, so that one that hangs or crashes
costs no other; the JSON is written anew after every row, the peers come last. Without a GPU the CPU mode runs: two rows
at a time, forked from a process that has loaded the libraries once. Its figures mean nothing but that the rows run, so
it writes its JSON only where --keep names a folder; ``cpu_seconds`` says what it took, however busy the machine was.

For a machine with Python 3.12 and torch (with its Triton and cuDNN) alone, carry these wheels (48 MB; imagecodecs is
28 of them) and `pip install --no-index --find-links wheels --no-deps` them; the rows `correctness`, `vae`, `unet_64`,
`unet_128`, `compiled`, `epoch` and `profile` need the first line only:

    numpy safetensors google-crc32c psutil
    pydicom zarr donfig numcodecs msgspec imagecodecs isal obstore dask distributed locket partd tblib zict tornado
    msgpack fsspec rich typer click shellingham annotated-doc mdurl markdown-it-py pygments toolz cloudpickle pydantic
    pydantic-core typing-inspection annotated-types typing-extensions pyarrow pyyaml jinja2 markupsafe scipy
    monai (for the row `peers` alone)

Keys that others rely on: encode_s, decode_s, encode_fraction, decode_fraction (of the matrix products' rate measured
in the same run), step_64_s, mfu_64, mfu_64_of_989, step_128_s, mfu_128, compile_s, epoch_s, end_to_end_ok,
predicted_over_peak. What did not run says why under ``rows``. ``*_before`` is the same code with CTPIPE_TRITON=0.
Prints a table, then one JSON object, which is also kept as infra/bench/results/gpu-<device>.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARK = "GPU-ROW "
"""Begins a line of a row's output that holds figures."""
DATA_SHEET_TFLOPS = 989.0
"""bfloat16 without sparsity, H100 SXM (NVIDIA H100 data sheet)."""


@dataclass(frozen=True)
class Row:
    """A measurement: ``module.function(device, small, say)`` in a process of its own.

    Attributes:
        seconds: Its limit on a GPU.
        cpu_share: Its limit in the CPU mode, of all the seconds there are.
    """

    name: str
    module: str
    function: str
    seconds: float
    cpu_share: float = 0.4


ROWS = (
    Row("correctness", "gpu_correct", "correctness", 90),
    Row("vae", "gpu_speed", "vae", 60),
    Row("unet_64", "gpu_speed", "unet_64", 60),
    Row("commands", "gpu_commands", "commands", 150, 0.95),
    Row("unet_128", "gpu_speed", "unet_128", 60),
    Row("vae_before", "gpu_speed", "vae_before", 40),
    Row("unet_64_before", "gpu_speed", "unet_64_before", 40),
    Row("epoch", "gpu_speed", "epoch", 40),
    Row("compiled", "gpu_speed", "compiled", 90),
    Row("profile", "gpu_speed", "profile", 40),
    Row("peers", "gpu_speed", "peers", 60),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of all rows together; 420, or 60 on a CPU")
    parser.add_argument("--rows", default=",".join(row.name for row in ROWS), help="comma separated")
    parser.add_argument("--cpu", action="store_true", help="every row at a small size on the CPU")
    parser.add_argument("--keep", type=Path, help="folder for the JSON; by default results, on a CPU none")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        run_row(options.row, small=options.cpu)
        return
    wanted = options.rows.split(",")
    if unknown := set(wanted) - {row.name for row in ROWS}:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}")
    small = options.cpu or not has_gpu()
    seconds = options.seconds or (60.0 if small else 420.0)
    keep = options.keep or (None if small else HERE / "results")
    sys.exit(0 if measure([row for row in ROWS if row.name in wanted], seconds, small, keep) else 1)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


LEAST_S = 10
"""No row begins on a GPU with fewer seconds left."""


def measure(rows: list[Row], seconds: float, small: bool, keep: Path | None) -> bool:
    """Run the rows until the time is up; True if every row that began ended well."""
    end = time.monotonic() + seconds
    result: dict[str, Any] = {"bench": "gpu", **machine(small), "rows": {}}
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    writing = threading.Lock()
    rows_context = forking() if small else None

    def run(row: Row) -> None:
        limit = min(end - time.monotonic(), row.cpu_share * seconds if small else row.seconds)
        if limit < (1 if small else LEAST_S):
            found: dict[str, Any] = {}
            outcome: dict[str, Any] = {"ok": False, "why": "no time left"}
        else:
            print(f"-- {row.name} (at most {limit:.0f} s)", flush=True)
            found, outcome = in_a_process(row, limit, rows_context)
            print(
                f"   {row.name}: {'ok' if outcome['ok'] else outcome['why']} after {outcome['seconds']} s", flush=True
            )
        with writing:
            result.update(found)
            result["rows"][row.name] = outcome
            if keep is not None:
                write(result, keep / f"gpu-{name}.json")

    # On a CPU no figure counts: two at a time, the longest first, the peers still last.
    with ThreadPoolExecutor(2 if small else 1) as pool:
        list(pool.map(run, sorted(rows, key=lambda r: (r.name == "peers", -r.seconds)) if small else rows))
    used = resource.getrusage(resource.RUSAGE_SELF)
    of_rows = sum(outcome.get("cpu_seconds", 0.0) for outcome in result["rows"].values())
    result["cpu_seconds"] = round(used.ru_utime + used.ru_stime + result.pop("import_cpu_s", 0.0) + of_rows, 1)
    if keep is not None:
        write(result, keep / f"gpu-{name}.json")
    print(json.dumps(result))
    return all(outcome["ok"] or outcome["why"] == "no time left" for outcome in result["rows"].values())


def write(result: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".tmp")
    aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.replace(target)


def machine(small: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": f"cpu {platform.machine()}" if small else "",
        "small": small,
        "versions": {"torch": version("torch"), "python": platform.python_version()},
    }
    if not small:
        import torch

        found["device"] = torch.cuda.get_device_name()
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


# One row in one process -----------------------------------------------------------------------------------------------


class Started(Protocol):
    """A row's process, in a process group that it leads."""

    pid: int

    def lines(self) -> Iterator[str]:
        """What it prints, until it has ended."""

    def wait(self) -> int:
        """Its exit code."""


class Spawned:
    """On a GPU: a fresh process, since CUDA cannot be used in a forked one."""

    def __init__(self, row: Row, errors: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": import_path()}
        if row.name.endswith("_before"):
            environment["CTPIPE_TRITON"] = "0"
        words = [sys.executable, str(HERE / "gpu.py"), "--row", row.name]
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        self.pid = self.process.pid

    def lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        with self.process.stdout:
            yield from self.process.stdout

    def wait(self) -> int:
        return self.process.wait()


class Forked:
    """On a CPU: forked from one that has imported everything, which is most of what a small row takes."""

    def __init__(self, row: Row, errors: Any, context: Any) -> None:
        self.reader, writer = context.Pipe(duplex=False)
        self.process = context.Process(target=forked_row, args=(row.name, writer, errors.name), daemon=False)
        self.process.start()
        writer.close()
        self.pid = self.process.pid

    def lines(self) -> Iterator[str]:
        with self.reader:
            while True:
                try:
                    yield self.reader.recv()
                except EOFError:
                    return

    def wait(self) -> int:
        self.process.join()
        return int(self.process.exitcode)


def forking() -> Any:
    """The context whose processes are forked from one that has imported what rows need, on one thread each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": import_path()}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu_loaded"])
    return context


def import_path() -> str:
    return os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])


def forked_row(name: str, writer: Any, errors: str) -> None:
    """What a forked process does: the row, with its output in a file and its figures in a pipe."""
    os.setsid()
    sys.stdout = sys.stderr = file = open(errors, "a", buffering=1)  # noqa: SIM115 - for as long as the process lives
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    if name.endswith("_before"):
        os.environ["CTPIPE_TRITON"] = "0"

    def say(**figures: Any) -> None:
        writer.send(MARK + json.dumps(figures))

    try:
        run_row(name, small=True, say=say)
    finally:
        import gpu_loaded

        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(u.ru_utime + u.ru_stime for u in used)
        say(import_cpu_s=gpu_loaded.CPU_SECONDS, row_cpu_s=round(cpu, 1))


@contextmanager
def killed_after(process: Started, seconds: float) -> Iterator[threading.Event]:
    """End the process group once the time is up; the event says that it was."""
    late = threading.Event()

    def end() -> None:
        late.set()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it does not lead its group yet
            os.kill(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def in_a_process(row: Row, limit: float, context: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures that a row said before it ended or was ended, and how it ended. ``context``: fork it from there."""
    begin = time.monotonic()
    found: dict[str, Any] = {}
    with tempfile.NamedTemporaryFile("w+") as errors:
        process: Started = Spawned(row, errors) if context is None else Forked(row, errors, context)
        with killed_after(process, limit) as late:
            for line in process.lines():
                if line.startswith(MARK):
                    figures = json.loads(line.removeprefix(MARK))
                    found |= figures
                    print("   " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
            code = process.wait()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    outcome: dict[str, Any] = {"ok": code == 0, "seconds": round(time.monotonic() - begin, 1)}
    if "row_cpu_s" in found:
        outcome["cpu_seconds"] = found.pop("row_cpu_s")
    if late.is_set():
        outcome["why"] = f"ended after its {limit:.0f} s"
    elif code:
        outcome["why"] = f"exit {code}: {said[-1] if said else ''}"[:300]
    return found, outcome


def run_row(name: str, *, small: bool, say: Any = None) -> None:
    """What the row's process does; its figures are printed where ``say`` does not take them."""
    (row,) = [row for row in ROWS if row.name == name]
    sys.path[:0] = [str(ROOT), str(HERE)]
    import torch

    def said(**figures: Any) -> None:
        print(MARK + json.dumps(figures), flush=True)

    device = torch.device("cpu" if small else "cuda")
    getattr(importlib.import_module(row.module), row.function)(device, small, say or said)


if __name__ == "__main__":
    main()
