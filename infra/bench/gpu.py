"""Everything that only a GPU can show, in one command: is it right, does every command run, how fast.

    python infra/bench/gpu.py [--seconds 420] [--rows correctness,vae,...] [--keep DIRECTORY]
    python infra/bench/gpu.py --cpu            every row at a small size, within 60 s on 2 cores; keeps nothing

Rows run in order of worth, each in a process of its own with a limit of its own, so that one that hangs or crashes
costs no other; the JSON is written anew after every row, the peers come last. Without a GPU the CPU mode runs.

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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        seconds: Its limit on a GPU; in the CPU mode it is nine tenths of all there are.
    """

    name: str
    module: str
    function: str
    seconds: float


ROWS = (
    Row("correctness", "gpu_correct", "correctness", 90),
    Row("vae", "gpu_speed", "vae", 60),
    Row("unet_64", "gpu_speed", "unet_64", 60),
    Row("commands", "gpu_commands", "commands", 150),
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
    parser.add_argument("--keep", type=Path, default=HERE / "results", help="folder for the JSON")
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
    sys.exit(0 if measure([row for row in ROWS if row.name in wanted], seconds, small, options.keep) else 1)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def measure(rows: list[Row], seconds: float, small: bool, keep: Path) -> bool:
    """Run the rows until the time is up; True if every row that began ended well."""
    end = time.monotonic() + seconds
    result: dict[str, Any] = {"bench": "gpu", **machine(small), "rows": {}}
    target = keep / f"gpu-{re.sub(r'[^a-z0-9]+', '-', result['device'].lower()).strip('-')}.json"

    def run(row: Row) -> None:
        limit = min(end - time.monotonic(), 0.9 * seconds if small else row.seconds)
        if limit < (1 if small else 10):
            result["rows"][row.name] = {"ok": False, "why": "no time left"}
            return
        print(f"-- {row.name} (at most {limit:.0f} s)", flush=True)
        found, outcome = in_a_process(row, limit, small)
        result.update(found)
        result["rows"][row.name] = outcome
        print(f"   {row.name}: {'ok' if outcome['ok'] else outcome['why']} after {outcome['seconds']} s", flush=True)
        if not small:
            keep.mkdir(parents=True, exist_ok=True)
            aside = target.with_suffix(".tmp")
            aside.write_text(json.dumps(result, indent=1) + "\n")
            aside.replace(target)

    # On a CPU no figure counts: two at a time, the longest first.
    with ThreadPoolExecutor(2 if small else 1) as pool:
        list(pool.map(run, sorted(rows, key=lambda row: -row.seconds) if small else rows))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result["cpu_seconds"] = round(used.ru_utime + used.ru_stime, 1)
    print(json.dumps(result))
    return all(outcome["ok"] or outcome["why"] == "no time left" for outcome in result["rows"].values())


def machine(small: bool) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "device": f"cpu {platform.machine()}" if small else torch.cuda.get_device_name(),
        "small": small,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    if not small:
        found["versions"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def in_a_process(row: Row, limit: float, small: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures that a row said before it ended or was ended, and how it ended."""
    begin = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if small:
        environment["OMP_NUM_THREADS"] = "1"
    if row.name.endswith("_before"):
        environment["CTPIPE_TRITON"] = "0"
    words = [sys.executable, str(HERE / "gpu.py"), "--row", row.name, *(["--cpu"] if small else [])]
    found: dict[str, Any] = {}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, start_new_session=True
        )
        late = threading.Event()

        def end() -> None:
            late.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(limit, end)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(MARK):
                figures = json.loads(line.removeprefix(MARK))
                found |= figures
                print("   " + ", ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
        process.stdout.close()
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        said = errors.read().strip().splitlines()
    outcome: dict[str, Any] = {"ok": code == 0, "seconds": round(time.monotonic() - begin, 1)}
    if late.is_set():
        outcome["why"] = f"ended after its {limit:.0f} s"
    elif code:
        outcome["why"] = f"exit {code}: {said[-1] if said else ''}"[:300]
    return found, outcome


def run_row(name: str, *, small: bool) -> None:
    """What the row's process does."""
    (row,) = [row for row in ROWS if row.name == name]
    sys.path[:0] = [str(ROOT), str(HERE)]
    import torch

    def say(**figures: Any) -> None:
        print(MARK + json.dumps(figures), flush=True)

    device = torch.device("cpu" if small else "cuda")
    getattr(importlib.import_module(row.module), row.function)(device, small, say)


if __name__ == "__main__":
    main()
