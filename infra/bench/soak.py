"""Thousands of small studies through ingest, encode, interpolate and send while every process fails.

    python infra/bench/soak.py [--studies 10000] [--seconds 3900] [--work DIR] [--quick]

Prints a table and keeps infra/bench/results/soak.json: `studies` were asked for, `done` fitted into the time; one that
was begun is finished. Workers are killed after 1 to 150 steps of their work, every sixteenth after thousands; the PACS
and the object store are killed too; one request in 150 to the store fails, and one slice in four hundred finds the disk
full. tests/support/soak.py does it. With --work the result so far is kept in DIR every minute, and a run that was cut
off is continued.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
FULL_SIZE = 10_000

if TYPE_CHECKING:
    from tests.support.soak import Soaked


def table(found: Soaked, load: float) -> dict[str, Any]:
    return {
        "bench": "soak",
        "device": f"{platform.machine()}-{os.cpu_count()}cpu",
        "full_size": FULL_SIZE,
        "hours_for_full_size": round(FULL_SIZE * found.tally.seconds / max(found.done, 1) / 3600, 1),
        "load_average_at_the_end": round(load, 1),
        **found.as_dict(),
    }


def main() -> int:
    os.environ["OMP_NUM_THREADS"] = "1"
    from tests.support.soak import SECRET, soak

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=FULL_SIZE)
    parser.add_argument("--seconds", type=float, default=3900.0)
    parser.add_argument("--kill-every", type=int, nargs=2, default=(1, 150))
    parser.add_argument("--work", type=Path, help="keep everything here, and go on where an earlier run was cut off")
    parser.add_argument("--quick", action="store_true", help="two hundred studies; nothing is kept")
    options = parser.parse_args()
    if options.quick:
        options.studies, options.seconds = 200, 600.0
    os.environ["CTPIPE_SECRET"] = SECRET

    def note(so_far: Soaked) -> None:
        if options.work is not None and so_far.figures:
            (options.work / "so_far.json").write_text(json.dumps(table(so_far, os.getloadavg()[2]), indent=1) + "\n")

    with contextlib.nullcontext(options.work) if options.work else tempfile.TemporaryDirectory() as scratch:
        lives = (options.kill_every[0], options.kill_every[1])
        found = soak(Path(scratch), options.studies, seconds=options.seconds, kill_every=lives, on_progress=note)
    result = table(found, os.getloadavg()[2])
    for name, value in result.items():
        print(f"{name:<32} {value}")
    print(json.dumps(result))
    if not options.quick:
        out = Path(__file__).parent / "results" / "soak.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
