"""Small studies through ingest, encode, interpolate and send while every process is killed at random, amid faults.

Five processes: a worker that ingests and encodes, and one that interpolates and sends, batch after batch, each started
again after every kill, as a service would be; a PACS; an object store; and this one, which starts and kills the others
and passes the store's requests on, some of which fail on purpose. Some of the workers' writes find the disk full. In
the end every study must have come through exactly once, and nothing may have grown with the work.
tests/support/soak_worker.py holds the first three.
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

from tests.support.soak_worker import BATCH, RATIO, ROLES, SECRET, THICK, WARM, Role, make_templates, pacs, worker

ASIDE = (".aside-", ".at-work-", ".partial-", ".part")
ONE_REQUEST_IN = 150
"""One request to the object store in so many fails, one way or another."""
POLL_S, NOTE_S = 0.1, 60.0
LONG_LIFE = (1500, 3000)
"""Steps of a worker that is to live for many batches, so that one sees what grows within it."""
ONE_LIFE_LONG_IN = 16
BETWEEN_PACS_KILLS, BETWEEN_STORE_KILLS = (1, 400), (1, 1200)
"""Steps of the worker that delivers, and of the one that catalogues: least and most."""
AWS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


@dataclass
class Tally:
    """What was done to the processes so far; kept in the soak's folder, so that one that was cut off can go on."""

    lives: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    crashes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    """Workers that ended of themselves, by an error that no person would answer with another try."""
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

    def growth(self, role: Role, name: str) -> float | None:
        """Median over each worker's later batches less its second: 0 where nothing grows with the work.

        None where no worker lived for four batches, so that nothing was measured.
        """
        lives: dict[int, list[float]] = defaultdict(list)
        for row in self.of(role):
            lives[row["life"]].append(row[name])
        grown = [statistics.median(rows[len(rows) // 2 :]) - rows[1] for rows in lives.values() if len(rows) > 3]
        return round(max(grown), 1) if grown else None

    def of(self, role: Role) -> list[dict[str, Any]]:
        return [row for row in self.figures if row["role"] == role]

    def peaks(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        return {name: max(row[name] for row in rows) for name in FLAT} if rows else {}

    def by_thousand(self, role: Role) -> list[dict[str, Any]]:
        """Time and size of every thousand studies, from which one sees whether anything slows down or grows."""
        out, figures = list[dict[str, Any]](), self.of(role)
        before = figures[0]["time"] - figures[0]["seconds"] if figures else 0.0
        for first in range(0, self.studies, 1000):
            rows = [row for row in figures if first < row["studies"] <= first + 1000]
            if not rows:
                continue
            alone = [row["cpu_s"] / BATCH for row in rows if row["undisturbed"]]
            seconds, before = rows[-1]["time"] - before, rows[-1]["time"]
            median = round(statistics.median(alone), 3) if alone else None
            figure = {"studies": rows[-1]["studies"], "seconds": round(seconds, 1), "undisturbed_batches": len(alone)}
            out.append({**figure, "cpu_s_per_study": median, **self.peaks(rows)})
        return out

    def of_role(self, role: Role) -> dict[str, Any]:
        """What the workers of one kind needed."""
        figures = self.of(role)
        quarter, lives = max(1, len(figures) // 4), Counter(row["life"] for row in figures)
        return {
            "batches": len(figures),
            "workers_of_four_batches_or_more": sum(1 for count in lives.values() if count > 3),
            "grown_within_a_worker": {name: self.growth(role, name) for name in FLAT},
            "peak_in_the_first_quarter": self.peaks(figures[:quarter]),
            "peak_in_the_last_quarter": self.peaks(figures[-quarter:]),
            "by_thousand": self.by_thousand(role),
        }

    def as_dict(self) -> dict[str, Any]:
        """The table, without every batch's figures."""
        return {
            "studies": self.studies,
            "done": self.done,
            **asdict(self.tally),
            "faults": {name: count for name, count in sorted(self.tally.faults.items()) if name},
            "requests": sum(self.tally.faults.values()),
            "failures": self.failures,
            "problems": self.problems,
            "repeated_instances": self.repeated_instances,
            **{role: self.of_role(role) for role in ROLES},
        }


FLAT = ("rss_mib", "files", "threads", "temporary")


class Processes:
    """The workers and the PACS, forked from a server that has imported everything once."""

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

    def worker(self, role: Role, store: str, studies: int, life: int) -> ForkServerProcess:
        process = self._context.Process(
            target=worker, args=(self.root, role, store, self.port, studies, life, self.environment)
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
    """An S3 server with conditional puts, of which one request in ``ONE_REQUEST_IN`` fails."""
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
    """Run the workers, kill them at random, and look at what is left once all is done or time is up.

    Args:
        root: An empty folder, or that of a soak that was cut off, which is then continued.
        studies: How many; those not begun when ``seconds`` are over are left out.
        kill_every: Least and most steps (a study made, catalogued, encoded; interpolated, sent) of a short life; of the
            worker that catalogues, twice as many at most. By what was done and not by the clock, so that a busy
            machine kills no worker that has done nothing.
        on_progress: Gets what was found so far, every minute.
    """
    tally = Tally.load(root)
    began, before, chance = time.monotonic(), tally.seconds, random.Random(seed + sum(tally.lives.values()))
    prepare(root)
    with object_store(root, chance) as (store, server):
        processes = Processes(root, server.environment | {"TMPDIR": str(root / "tmp")})
        earlier = Counter(tally.faults)

        def note() -> None:
            tally.seconds = round(before + time.monotonic() - began, 1)
            tally.faults = dict(earlier + server.seen)
            tally.save(root)

        try:
            lives = [Life(role, processes, store, studies, tally, chance, kill_every) for role in ROLES]
            due, noted = {role: steps_done(root, role) for role in ROLES}, began
            while time.monotonic() - began < seconds and not finished(root, studies):
                if sum([one.over() for one in lives]):
                    note()
                if time.monotonic() >= noted + NOTE_S:
                    noted = time.monotonic()
                    on_progress(found_so_far(root, studies, tally))
                if (steps := steps_done(root, "deliver")) >= due["deliver"]:
                    processes.kill_pacs(chance.uniform(0.0, 1.0))
                    tally.pacs_kills, due["deliver"] = tally.pacs_kills + 1, steps + chance.randint(*BETWEEN_PACS_KILLS)
                if (steps := steps_done(root, "catalogue")) >= due["catalogue"]:
                    server.restart()
                    tally.store_kills += 1
                    due["catalogue"] = steps + chance.randint(*BETWEEN_STORE_KILLS)
                time.sleep(POLL_S)
            for one in lives:
                one.end()
            server.fault = lambda number, method, path: ""
            done = min(studies, len(list((root / "archive").glob("batch*"))) * BATCH)
            last = [processes.worker(role, store, done, -1) for role in ROLES]
            for process in last:
                process.join()
                assert process.exitcode == 0, "the last worker failed"
            note()
        finally:
            processes.end()
    found = found_so_far(root, studies, tally)
    found.done, found.problems = done, judged(root, done)
    if any(tally.crashes.values()):
        found.problems.append(f"workers ended by errors of their own: {tally.crashes}")
    return found


def prepare(root: Path) -> None:
    for name in ("tmp", "sent", "out", *(f"done/{role}" for role in ROLES)):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not (root / "vae.safetensors").exists():
        made = multiprocessing.get_context("spawn").Process(target=make_templates, args=(root,))  # keeps torch out
        made.start()
        made.join()
        assert made.exitcode == 0, "no templates"


class Life:
    """A worker's life after another: each ends by a kill after as many steps as chance gave it."""

    def __init__(
        self,
        role: Role,
        processes: Processes,
        store: str,
        studies: int,
        tally: Tally,
        chance: random.Random,
        kill_every: tuple[int, int],
    ) -> None:
        self.role, self.processes, self.kill_every = role, processes, kill_every
        self.tally, self.chance = tally, chance
        self._start = lambda: processes.worker(role, store, studies, tally.lives[role])
        self._begin()

    def _begin(self) -> None:
        self.process = self._start()
        self.tally.lives[self.role] += 1
        long = self.tally.lives[self.role] % ONE_LIFE_LONG_IN == 0
        least, most = LONG_LIFE if long else self.kill_every
        steps = self.chance.randint(least, most if self.role == "deliver" else 2 * most)  # it takes longer to start
        self.wanted = steps_done(self.processes.root, self.role) + steps

    def over(self) -> bool:
        """Whether this life ended now, by a kill or of itself; the next has then begun."""
        if self.process.is_alive() and steps_done(self.processes.root, self.role) < self.wanted:
            return False
        if self.process.exitcode == 0:  # through with everything
            return False
        time.sleep(self.chance.uniform(0.0, 0.3))  # not always just after a step
        self.end()
        self._begin()
        return True

    def end(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.tally.kills[self.role] += 1
        elif self.process.exitcode:
            self.tally.crashes[self.role] += 1
        self.process.join()


def steps_done(root: Path, role: Role) -> int:
    """What moves on while a worker works: studies made, catalogued and encoded; interpolated and sent."""
    path = root / f"steps-{role}"
    return path.stat().st_size if path.exists() else 0


def finished(root: Path, studies: int) -> bool:
    return delivered(root) >= studies


def delivered(root: Path) -> int:
    return len(list((root / "done" / "deliver").glob("*"))) * BATCH


def found_so_far(root: Path, studies: int, tally: Tally) -> Soaked:
    """Everything but the judgement."""
    figures = [json.loads(line) for line in lines_of(root / "figures.jsonl")]
    failures = Counter(line.partition("\t")[0] for line in lines_of(root / "failures.log"))
    stored = Counter(line.split("\t")[2] for line in lines_of(root / "pacs.tsv"))
    done = min(studies, delivered(root))
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


__all__ = ["SECRET", "Soaked", "Tally", "soak"]
