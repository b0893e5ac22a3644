"""Thousands of small studies through ingest, encode, interpolate and send while workers, store and PACS fail.

    python infra/bench/soak.py [--studies 10000] [--seconds 720] [--quick]

Prints a table and keeps infra/bench/results/soak.json: `studies` were asked for, `done` fitted into the time; one that
was begun is finished. The worker is killed after 1 to 150 steps of its work, one request in fifty to the object store
fails, one slice in sixty finds the disk full, the PACS goes down at every third kill. tests/support/soak.py does it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
FULL_SIZE = 10_000


def main() -> int:
    from tests.support.soak import SECRET, soak

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=FULL_SIZE)
    parser.add_argument("--seconds", type=float, default=720.0)
    parser.add_argument("--kill-every", type=int, nargs=2, default=(1, 150))
    parser.add_argument("--quick", action="store_true", help="twenty studies; nothing is kept")
    options = parser.parse_args()
    if options.quick:
        options.studies, options.seconds = 20, 120.0
    os.environ["CTPIPE_SECRET"] = SECRET
    with tempfile.TemporaryDirectory() as scratch:
        lives = (options.kill_every[0], options.kill_every[1])
        found = soak(Path(scratch), options.studies, seconds=options.seconds, kill_every=lives)
    result = {
        "bench": "soak",
        "device": f"{platform.machine()}-{os.cpu_count()}cpu",
        "full_size": FULL_SIZE,
        "hours_for_full_size": round(FULL_SIZE * found.seconds / max(found.done, 1) / 3600, 1),
        **found.as_dict(),
    }
    for name, value in result.items():
        print(f"{name:<22} {value}")
    print(json.dumps(result))
    if not options.quick:
        out = Path(__file__).parent / "results" / "soak.json"
        out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(found.problems))


if __name__ == "__main__":
    sys.exit(main())
