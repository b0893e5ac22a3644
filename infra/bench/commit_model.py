"""The commit protocol's model in every order of requests, crashes, lost answers and sleeps: how many states.

    python infra/bench/commit_model.py [--processes 3] [--odd [--most 500000] [--resume]] [--quick]

Prints a line a set of processes and keeps infra/bench/results/commit_model.json after each. --odd gives three processes
what else two are given (two sleeps, a put that arrives twice, a listing that lags) on a store with conditional puts, up
to a number of states a set, sets without gc first, and keeps commit_model_odd.json, which says of each set whether it
was cut; --resume leaves out the sets that it has, cut at no fewer. The model is tests/support/commit_model.py; what it
holds and what it leaves out is in infra/docs/store-guarantees.md. A fault ends with exit code 1 and the way to it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STORES = {True: "conditional puts", False: "no conditional puts"}
sys.path[:0] = [str(ROOT)]


def main() -> int:
    from tests.support.commit_model import explore, odd_budget_of, sets_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=3, help="drivers, gcs and pins at once")
    parser.add_argument("--quick", action="store_true", help="two processes; nothing is kept")
    parser.add_argument("--odd", action="store_true", help="three processes with two sleeps, repeats and lags")
    parser.add_argument("--most", type=int, default=500_000, help="states of a set with --odd")
    parser.add_argument("--resume", action="store_true", help="leave out the sets that the result has")
    options = parser.parse_args()
    out = Path(__file__).parent / "results" / ("commit_model_odd.json" if options.odd else "commit_model.json")
    sets = list(sets_of(2 if options.quick else options.processes))
    if options.odd:
        sets = [
            (kinds, rules, odd_budget_of(rules)) for kinds, rules, _ in sets if rules.conditional and len(kinds) > 2
        ]
        sets.sort(key=lambda one: "gc" in one[0])
    kept: list[dict[str, Any]] = json.loads(out.read_text())["rows"] if options.resume and out.exists() else []
    rows = [row for row in kept if not row.get("cut") or row["states"] >= options.most]
    known = {(row["store"], row["processes"]) for row in rows}
    for chosen, rules, budget in sets:
        store, processes = STORES[rules.conditional], " + ".join(chosen)
        if (store, processes) in known:
            continue
        started = time.perf_counter()
        found = explore(chosen, rules, most=options.most if options.odd else None, **budget)
        seconds = round(time.perf_counter() - started, 1)
        row = {"store": store, "processes": processes, **budget, "states": found.states, "s": seconds}
        cut = options.odd and found.states >= options.most
        rows.append({**row, "cut": cut} if options.odd else row)
        print(f"{store}: {processes}: {found.states:,} states, {seconds} s{', cut' if cut else ''}", flush=True)
        if found.fault:
            print(found.fault, *found.way, sep="\n  ")
            return 1
        if not options.quick:
            out.write_text(json.dumps({**totals(rows, len(sets)), "rows": rows}, indent=1) + "\n")
    print(json.dumps(totals(rows, len(sets))))
    return 0


def totals(rows: list[dict[str, Any]], sets: int) -> dict[str, Any]:
    """Of the sets that were explored, without a fault."""
    states, seconds = sum(row["states"] for row in rows), round(sum(row["s"] for row in rows), 1)
    return {"states": states, "seconds": seconds, "faults": 0, "sets_done": len(rows), "sets": sets}


if __name__ == "__main__":
    sys.exit(main())
