"""SIGKILL, again and again: writers die at random moments, and every store is verified afterwards.

    python infra/bench/kills.py [--kills 10000] [--seconds 3000] [--seed 0 | --resume]

Prints a line a store and, last, one JSON object, also kept in infra/bench/results/kills.json after every store. Stops
at the number of kills or the time, whichever comes first; ``--resume`` goes on with the next seed. One process writes
and one kills; no fsync, since no kernel is killed (lost writes are simulated in tests/latentcache/test_writer.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
A_STORE = 200
"""Kills a store: it stays small, so that a writer is killed while it commits and not while it starts."""


def main() -> None:
    from tests.support.kills import kill_writers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=3000.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="add to the kept result")
    options = parser.parse_args()
    out = Path(__file__).parent / "results" / "kills.json"
    total = dict.fromkeys(("kills", "acknowledged", "rows", "lost", "in_flight_taken", "orphans_left"), 0)
    problems: list[str] = []
    stores, before, seed = 0, 0.0, options.seed
    if options.resume and out.exists():
        kept = json.loads(out.read_text())
        total = {name: kept[name] for name in total}
        problems, stores, before, seed = kept["problems"], kept["stores"], kept["seconds"], kept["seed"]
    began, line = time.perf_counter(), "nothing to do"
    while total["kills"] < options.kills and time.perf_counter() - began < options.seconds:
        with tempfile.TemporaryDirectory() as folder:
            found = kill_writers(Path(folder), min(A_STORE, options.kills - total["kills"]), seed + stores)
        stores += 1
        problems += found.problems
        for name in total:
            total[name] += getattr(found, name)
        took = before + time.perf_counter() - began
        result = {**total, "problems": problems, "stores": stores, "seed": seed, "seconds": round(took, 1)}
        line = json.dumps(result, sort_keys=True)
        out.write_text(line + "\n")
        print(
            f"{total['kills']} kills, {total['acknowledged']} latents, {total['kills'] / took:.1f} a second", flush=True
        )
    print(line)


if __name__ == "__main__":
    main()
