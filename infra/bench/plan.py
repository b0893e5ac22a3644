"""Whether the cost model predicts: a small encode job's time from the timings of a smaller one.

    python infra/bench/plan.py [--quick]

Phantoms of two sizes are encoded by the tiny VAE, in one thread, into one store; ``ctpipe plan --from`` of that store
then says what twice as many would take on one worker and on two, and such jobs are run. ``predicted_over_measured_N``
is the ratio for N workers, and the model is said to hold within a factor of 1.25. The clock of a job runs from its
first result to its last, per item, because starting up is paid once whatever the job. ``stage_s_N`` is the median of
the stages' own seconds: where it moves between jobs, the machine did, and not the model. So ``own_over_measured_N``
predicts each job from its own timings too: there the machine is the same, and what is left is the model's arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from latentcache import LatentStore
from pipeline.encode import EncodeSettings, encode_store
from pipeline.engines import EngineOptions, Rates, cost, measured
from pipeline.ingest import IngestOptions, ingest, open_stores
from pipeline.phantom import write_dataset

SETTINGS = EncodeSettings(torch_threads=1, reader_threads=1, round_trip_fraction=0.0)


def ingested(root: Path, patients: int, size: int) -> Path:
    """A store with phantoms of two depths, not encoded yet."""
    write_dataset(root / "data" / "short", patients=patients // 2, size=size, n_thin=44)
    write_dataset(root / "data" / "long", patients=patients // 2, size=size, n_thin=88, seed=1)
    store, private = open_stores(str(root / "store"))
    ingest(str(root / "data"), store, private, IngestOptions())
    return root / "store"


def encode_seconds(store: Path, workers: int) -> tuple[float, list[float]]:
    """Seconds that the whole job takes at the pace between its first results and its last, and each item's own."""
    ticks: list[float] = []
    stages: list[float] = []
    encode_store(
        str(store),
        SETTINGS,
        EngineOptions(name="ray", devices=("cpu",) * workers),
        on_outcome=lambda outcome, planned: (
            ticks.append(time.monotonic()),
            stages.append(sum(outcome.seconds.values())),
        ),
    )
    pace = (ticks[-1] - ticks[workers - 1]) / (len(ticks) - workers)
    return pace * len(ticks), stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    patients, size = (6, 64) if options.quick else (16, 128)
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")  # else they stand behind whatever else this machine does
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=40)
    result: dict[str, Any] = {
        "bench": "plan",
        "device": "cpu",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory(prefix="plan-bench-") as folder:
        root = Path(folder)
        small = ingested(root / "small", patients // 2 + patients // 2 % 2, size)
        _, first = encode_seconds(small, 1)
        result["stage_s_0"] = statistics.median(first)
        rates, _ = measured(LatentStore.open(small).table("timings"), Rates())
        job = ingested(root / "job", patients, size)
        for workers in (1, 2):
            copy = root / f"job{workers}"
            shutil.copytree(job, copy)
            took, stages = encode_seconds(copy, workers)
            own, _ = measured(LatentStore.open(copy).table("timings"), Rates())
            predicted, again = (
                cost(len(stages), 0, found, os.cpu_count(), workers).hours * 3600 for found in (rates, own)
            )
            result |= {
                f"items_{workers}": len(stages),
                f"stage_s_{workers}": statistics.median(stages),
                f"measured_s_{workers}": took,
                f"predicted_s_{workers}": predicted,
                f"predicted_over_measured_{workers}": predicted / took,
                f"own_over_measured_{workers}": again / took,
            }
    for name, value in result.items():
        print(f"{name:28} {value:.4g}" if isinstance(value, float) else f"{name:28} {value}")
    if not options.quick:
        out = Path(__file__).parent / "results" / "plan-cpu.json"
        out.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, sort_keys=True))


if __name__ == "__main__":
    main()
