"""Thousands of planted identifiers through every command: what leaves PRIVATE, and the share of right actions.

    python infra/bench/deidentification.py [--patients 4] [--processes] [--quick]

Prints a table and keeps infra/bench/results/deidentification.json (deidentification-processes.json). Commands run in
the modes normal, --json and --debug --log-json: in this process, where logs of every level are searched too, or with
--processes in one of their own each. Ray's own logs, of workers, raylets and drivers, are searched like any output. A
leak, or a share below 99.95 %, ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
LEAST = 0.9995


def main() -> int:
    from tests.support.deidentification_score import InProcess, Run, Spoken, score_all, worked
    from tests.support.planted_identifiers import make_archive, rows_in_files

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=4)
    parser.add_argument("--processes", action="store_true", help="a process for every command")
    parser.add_argument("--quick", action="store_true", help="two patients, no training; nothing is kept")
    options = parser.parse_args()
    if options.quick:
        options.patients = 2

    os.environ["CTPIPE_SECRET"] = "5a" * 32

    def apart(words: Sequence[str]) -> Spoken:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "cli.main", *words], env=environment, capture_output=True, text=True, check=False
        )
        return Spoken(done.stdout + done.stderr, done.returncode)

    run: Run = apart if options.processes else InProcess()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        made, work = make_archive(Path(scratch, "archive", "data"), options.patients), Path(scratch, "work")
        work.mkdir()
        score = score_all(made, work, worked(made, work, run, train=not options.quick))
    planted = made.planter.planted
    result = {
        "identifiers": len(planted),
        "identifiers_by_kind": dict(sorted(Counter(one.kind for one in planted.values()).items())),
        "table_rows": len(rows_in_files()),
        "patients": options.patients,
        "processes": options.processes,
        "seconds": round(time.perf_counter() - began, 1),
        **score.as_dict(),
    }
    for name, (right, n) in result["by_category"].items():
        print(f"{name:<26}{right:>8} of {n}")
    print(f"{result['identifiers']} identifiers, {result['actions']} actions, {score.share:.4%} right")
    print(*score.leaks[:20], *score.wrong[:20], sep="\n")
    print(json.dumps(result))
    if not options.quick:
        name = "deidentification-processes.json" if options.processes else "deidentification.json"
        out = Path(__file__).parent / "results" / name
        out.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(score.leaks) or score.share < LEAST)


if __name__ == "__main__":
    sys.exit(main())
