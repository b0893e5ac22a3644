"""Small studies through ingest, encode, interpolate and send while every process is killed at random, amid faults.

Four processes: the worker, which does batch after batch and is started again after every kill, as a service would be;
a PACS; an object store; and this one, which starts and kills the others and passes the store's requests on, some of
which fail on purpose. Some of the worker's writes find the disk full. In the end every study must have come through
exactly once, and nothing may have grown with the work. tests/support/soak_worker.py holds the first two.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.support.soak_worker import BATCH, RATIO, SECRET, THICK, WARM, make_templates, out_of, pacs, worker

ASIDE = (".aside-", ".at-work-", ".partial-", ".part")
ONE_REQUEST_IN = 50
"""One request to the object store in so many fails, one way or another."""
POLL_S = 0.1
LONG_LIFE = (1500, 3000)
"""Steps of a worker that is to live for many batches, so that one sees what grows within it."""
ONE_LIFE_LONG_IN = 16
BETWEEN_PACS_KILLS, BETWEEN_STORE_KILLS = (1, 900), (1, 1800)
"""Steps, least and most."""
AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


@dataclass
class Tally:
    """What was done to the processes so far; kept in the soak's folder, so that one that was cut off can go on."""

    lives: int = 0
    kills: int = 0
    pacs_kills: int = 0
    store_kills: int = 0
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Path) -> Tally:
        path = root / "tally.json"
        return cls(**json.loads(path.read_text())) if path.exists() else cls()

    def save(self, root: Path) -> None:
        draft = root / ".tally.json"
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(root / "tally.json")


@dataclass
class Soaked:
    """What a soak found."""

    studies: int
    done: int
    tally: Tally
    failures: dict[str, int]
    problems: list[str]
    repeated_instances: int
    figures: list[dict[str, Any]]

    def growth(self, name: str) -> float | None:
        """Median over each worker's later batches less its second: 0 where nothing grows with the work.

        None where no worker lived for four batches, so that nothing was measured.
        """
        lives: dict[int, list[float]] = defaultdict(list)
        for row in self.figures:
            lives[row["life"]].append(row[name])
        grown = [statistics.median(rows[len(rows) // 2 :]) - rows[1] for rows in lives.values() if len(rows) > 3]
        return round(max(grown), 1) if grown else None

    def peaks(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {name: max(row[name] for row in rows) for name in FLAT} if rows else {}

    def by_thousand(self) -> list[dict[str, Any]]:
        """Time and size of every thousand studies, from which one sees whether anything slows down or grows."""
        out, before = [], self.figures[0]["time"] - self.figures[0]["seconds"] if self.figures else 0.0
        for first in range(0, self.done, 1000):
            rows = [row for row in self.figures if first < row["studies"] <= first + 1000]
            if not rows:
                continue
            alone = [row["cpu_s"] / BATCH for row in rows if row["undisturbed"]]
            out.append(
                {
                    "studies": rows[-1]["studies"],
                    "seconds": round(rows[-1]["time"] - before, 1),
                    "undisturbed_batches": len(alone),
                    "worker_cpu_s_per_study": round(statistics.median(alone), 3) if alone else None,
                    **self.peaks(rows),
                }
            )
            before = rows[-1]["time"]
        return out

    def as_dict(self) -> dict[str, Any]:
        """The table, without every batch's figures."""
        quarter = max(1, len(self.figures) // 4)
        lives = Counter(row["life"] for row in self.figures)
        return {
            "studies": self.studies,
            "done": self.done,
            **asdict(self.tally),
            "faults": {name: count for name, count in sorted(self.tally.faults.items()) if name},
            "requests": sum(self.tally.faults.values()),
            "failures": self.failures,
            "problems": self.problems,
            "repeated_instances": self.repeated_instances,
            "batches": len(self.figures),
            "workers_of_four_batches_or_more": sum(1 for count in lives.values() if count > 3),
            "grown_within_a_worker": {name: self.growth(name) for name in FLAT},
            "peak_in_the_first_quarter": self.peaks(self.figures[:quarter]),
            "peak_in_the_last_quarter": self.peaks(self.figures[-quarter:]),
            "by_thousand": self.by_thousand(),
        }


FLAT = ("rss_mib", "files", "threads", "temporary")


class Processes:
    """The worker and the PACS, forked from a server that has imported everything once."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root, self.environment, self.port = root, environment, free_port()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(WARM))
        self.pacs = self._pacs()

    def _pacs(self) -> ForkServerProcess:
        process = self._context.Process(target=pacs, args=(self.root, self.port))
        process.start()
        return process

    def kill_pacs(self, away_s: float) -> None:
        self.pacs.kill()
        self.pacs.join()
        time.sleep(away_s)
        self.pacs = self._pacs()

    def worker(self, store: str, studies: int, life: int) -> ForkServerProcess:
        process = self._context.Process(
            target=worker, args=(self.root, store, self.port, studies, life, self.environment)
        )
        process.start()
        return process

    def end(self) -> None:
        self.pacs.kill()
        self.pacs.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def object_store(root: Path, chance: random.Random) -> Iterator[tuple[str, Any]]:
    """An S3 server with conditional puts, of which one request in fifty fails."""
    from tests.support.s3_server import serve

    with serve(root / "s3", conditional=True) as server:
        kinds = ("500", "drop", "drop-answer", "507", "cut")
        server.fault = lambda number, method, path: chance.choice(kinds) if not chance.randrange(ONE_REQUEST_IN) else ""
        yield "s3://bucket/store", server


def soak(
    root: Path,
    studies: int,
    *,
    seconds: float,
    seed: int = 0,
    kill_every: tuple[int, int],
    on_progress: Callable[[Soaked], object] = lambda found: None,
) -> Soaked:
    """Run the worker, kill it at random, and look at what is left once all is done or time is up.

    Args:
        root: An empty folder, or that of a soak that was cut off, which is then continued.
        studies: How many; those not begun when ``seconds`` are over are left out.
        kill_every: Least and most steps (a study made, catalogued, encoded, interpolated or sent) of a short life. By
            what was done and not by the clock, so that a busy machine kills no worker that has done nothing.
        on_progress: Gets what was found so far at every kill.
    """
    tally = Tally.load(root)
    began, before, chance = time.monotonic(), tally.seconds, random.Random(seed + tally.lives)
    prepare(root)
    with object_store(root, chance) as (store, server):
        processes = Processes(root, server.environment | {"TMPDIR": str(root / "tmp")})
        earlier = Counter(tally.faults)

        def note() -> None:
            tally.seconds = round(before + time.monotonic() - began, 1)
            tally.faults = dict(earlier + server.seen)
            tally.save(root)

        def time_is_left() -> bool:
            return time.monotonic() - began < seconds

        try:
            due = {"pacs": steps_done(root), "store": steps_done(root)}
            while time_is_left() and not finished(root, studies):
                live(processes, server, store, studies, tally, chance, kill_every, due, time_is_left)
                note()
                on_progress(found_so_far(root, studies, tally))
            server.fault = lambda number, method, path: ""
            done = min(studies, len(list((root / "archive").glob("batch*"))) * BATCH)
            last = processes.worker(store, done, -1)
            last.join()
            assert last.exitcode == 0, "the last worker failed"
            note()
        finally:
            processes.end()
    found = found_so_far(root, studies, tally)
    found.done, found.problems = done, judged(root, done)
    return found


def prepare(root: Path) -> None:
    for name in ("tmp", "sent", "out"):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not (root / "vae.safetensors").exists():
        made = multiprocessing.get_context("spawn").Process(target=make_templates, args=(root,))  # keeps torch out
        made.start()
        made.join()
        assert made.exitcode == 0, "no templates"


def live(
    processes: Processes,
    server: Any,
    store: str,
    studies: int,
    tally: Tally,
    chance: random.Random,
    kill_every: tuple[int, int],
    due: dict[str, int],
    time_is_left: Callable[[], bool],
) -> None:
    """One worker's life, and the kills of the PACS and the store that are due meanwhile."""
    root = processes.root
    process = processes.worker(store, studies, tally.lives)
    tally.lives += 1
    bounds = LONG_LIFE if tally.lives % ONE_LIFE_LONG_IN == 0 else kill_every
    wanted, pause = steps_done(root) + chance.randint(*bounds), chance.uniform(0.0, 0.5)
    while process.is_alive() and time_is_left() and (steps := steps_done(root)) < wanted:
        if steps >= due["pacs"]:
            processes.kill_pacs(chance.uniform(0.0, 1.0))
            tally.pacs_kills, due["pacs"] = tally.pacs_kills + 1, steps + chance.randint(*BETWEEN_PACS_KILLS)
        if steps >= due["store"]:
            server.restart()
            tally.store_kills, due["store"] = tally.store_kills + 1, steps + chance.randint(*BETWEEN_STORE_KILLS)
        process.join(POLL_S)
    process.join(pause)
    if process.is_alive():
        process.kill()
        tally.kills += 1
    process.join()


def steps_done(root: Path) -> int:
    """What moves on while a worker works: studies made, catalogued, encoded, interpolated and sent."""
    path = root / "steps"
    return path.stat().st_size if path.exists() else 0


def finished(root: Path, studies: int) -> bool:
    return len(list((root / "done").glob("*"))) * BATCH >= studies


def found_so_far(root: Path, studies: int, tally: Tally) -> Soaked:
    """Everything but the judgement."""
    figures = [json.loads(line) for line in lines_of(root / "figures.jsonl")]
    failures = Counter(line.partition("\t")[0] for line in lines_of(root / "failures.log"))
    stored = Counter(line.split("\t")[2] for line in lines_of(root / "pacs.tsv"))
    done = min(studies, len(list((root / "done").glob("*"))) * BATCH)
    return Soaked(studies, done, tally, dict(failures), [], sum(stored.values()) - len(stored), figures)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# -- the judge ---------------------------------------------------------------------------------------------------------


def judged(root: Path, done: int) -> list[str]:
    """What is wrong after all: empty where every study came through exactly once and nothing was left behind.

    The store is looked at in the folder behind the object store, which holds the same files.
    """
    from latentcache import LatentStore
    from latentcache.maintenance import collect, verify

    store = LatentStore.open(str(root / "s3" / "bucket" / "store"))
    problems = [f"verify: {problem.what}" for problem in verify(store).problems]
    roles = Counter(row.role for row in store.series() if row.status == "ok")
    if roles != {"thick": done, "thin": done}:
        problems.append(f"the catalog holds {dict(roles)} of {done} studies")
    latents = Counter((row.key, row.role) for row in store.records())
    by_role = Counter(role for _, role in latents)
    if max(latents.values(), default=0) > 1 or by_role != dict.fromkeys(("thick", "thin", "thick_on_thin"), done):
        problems.append(f"latents {dict(by_role)} of {done} studies, the most frequent {max(latents.values())} times")
    problems += pacs_problems(root, done)
    collect(store, grace_s=-60.0)
    aside = [path.name for path in root.rglob(".*") if path.name.startswith(ASIDE) or path.name.endswith(".partial")]
    if aside:
        problems.append(f"{len(aside)} files were left aside, the first {aside[0]}")
    if left := [name for _, _, names in os.walk(root / "tmp") for name in names]:
        problems.append(f"{len(left)} files were left in the temporary folder")
    if unsent := list((root / "out").rglob("*.unsent.json")):
        problems.append(f"{len(unsent)} lists of unsent images are left")
    return problems


def pacs_problems(root: Path, done: int) -> list[str]:
    """Whether the PACS holds one whole series a study, and stored one content under each instance."""
    held: dict[str, dict[str, dict[str, set[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for line in lines_of(root / "pacs.tsv"):
        study, series, instance, checksum = line.split("\t")
        held[study][series][instance].add(checksum)
    several = [study for study, series in held.items() if len(series) != 1]
    every = [one for series in held.values() for one in series.values()]
    short = [one for one in every if len(one) != THICK * RATIO]
    unlike = [1 for one in every for contents in one.values() if len(contents) != 1]
    if len(held) == done and not (several or short or unlike):
        return []
    told = f"{len(several)} with several series, {len(short)} in part, {len(unlike)} instances of several contents"
    return [f"the PACS holds {len(held)} of {done} studies, {told}"]


__all__ = ["SECRET", "Soaked", "Tally", "out_of", "soak"]
