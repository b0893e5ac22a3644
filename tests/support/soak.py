"""Small studies through ingest, encode, interpolate and send, by a worker that is killed at random amid faults.

The parent keeps a PACS (C-STORE SCP), which goes down now and then, and an object store that fails on purpose; the
worker is a process of its own that does batch after batch and is started again after every kill, as a service would
be. Some of the worker's writes find the disk full. In the end every study must have come through exactly once.

    python tests/support/soak.py ROOT STORE PORT STUDIES SEED      the worker
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
BATCH = 10
SECRET = "5a" * 32
ASIDE = (".aside-", ".at-work-", ".partial-")
FULL_EVERY = 60
"""One slice in so many finds the disk full."""


# -- the worker --------------------------------------------------------------------------------------------------------


def archive_of(root: Path, number: int) -> Path:
    """The zip of one study, made where it is missing: a thick and a thin series of eight and forty slices."""
    from pipeline.phantom import make_patient
    from tests.support.hospital import study, write_zip

    path = root / f"batch{number // BATCH:05d}" / f"study{number:05d}.zip"
    if not path.exists():
        (thick, thin), hu = study(f"PAT{number}", number), make_patient(number, size=16, n_thin=20).thin.hu
        from dataclasses import replace

        means = hu.reshape(4, 5, 16, 16).mean(axis=1).round().astype(hu.dtype)
        made = [replace(thick, image=means, pixel=20.0), replace(thin, image=hu, pixel=20.0)]
        write_zip(path.with_name(f".{path.name}"), made).replace(path)
    return path


def interpolate(archive: Path, out: Path) -> Path:
    """The folder of a study's thin series, written if it is not there yet."""
    from pipeline.workflows import interpolate_study
    from pipeline.writing import is_written_series

    done = [folder for folder in out.glob("*") if is_written_series(folder)] if out.exists() else []
    return done[0] if done else interpolate_study(archive, out, device="cpu", page=False).folder


def do_batch(root: Path, store_url: str, port: int, numbers: range) -> None:
    """One batch through all four steps; whatever an earlier worker did of it is taken as it is."""
    from pipeline.encode import EncodeSettings, encode_store
    from pipeline.engines import EngineOptions
    from pipeline.ingest import ingest, open_stores
    from pipeline.writing.pacs import CStore, send_folder

    archives = [archive_of(root / "archive", number) for number in numbers]
    store, private = open_stores(store_url, str(root / "private"))
    ingest(str(archives[0].parent), store, private)
    options = EngineOptions(name="inline")
    encode_store(store_url, EncodeSettings(vae="tiny", torch_threads=1), options, private_url=str(root / "private"))
    for number, archive in zip(numbers, archives, strict=True):
        mark = root / "sent" / str(number)
        if not mark.exists():
            folder = interpolate(archive, root / "out" / f"{number:05d}")
            summary = send_folder(folder, CStore("127.0.0.1", port, "SOAK", timeout_s=30), backoff_s=0.2)
            if summary.left:
                raise ConnectionError(summary.reason)
            mark.parent.mkdir(exist_ok=True)
            mark.touch()


def now_and_then_full(chance: random.Random) -> None:
    """Let some slices find the disk full."""
    written = importlib.import_module("pipeline.writing.ct_image")
    real = written._write_file

    def write(path: Path, parts: Any) -> None:
        if chance.randrange(FULL_EVERY) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, parts)

    written._write_file = write


def worker(root: Path, store_url: str, port: int, studies: int, seed: int) -> None:
    """Do what is left, batch after batch; after each note memory, open files and files left aside."""
    import psutil

    from latentcache import CtpipeError

    os.environ["CTPIPE_SECRET"] = SECRET
    if seed >= 0:
        now_and_then_full(random.Random(seed))
    me = psutil.Process()
    for first in range(0, studies, BATCH):
        done = root / "done" / str(first)
        if done.exists():
            continue
        while True:
            try:
                do_batch(root, store_url, port, range(first, min(first + BATCH, studies)))
                break
            except (OSError, CtpipeError) as error:  # what a person would do: run it again
                with (root / "failures.log").open("a") as log:
                    log.write(f"{type(error).__name__}\n")
        done.parent.mkdir(exist_ok=True)
        done.touch()
        figures = {
            "worker": os.getpid(),
            "studies": min(first + BATCH, studies),
            "rss_mib": round(me.memory_info().rss / 2**20, 1),
            "files": me.num_fds(),
            "threads": me.num_threads(),
        }
        with (root / "figures.jsonl").open("a") as log:
            log.write(json.dumps(figures) + "\n")


# -- the parent --------------------------------------------------------------------------------------------------------


@dataclass
class Pacs:
    """A C-STORE SCP that keeps what it got: files by study and series, and how often each came."""

    port: int
    got: dict[str, dict[str, Counter[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Counter)))
    restarts: int = 0
    _server: Any = None

    def start(self) -> None:
        from pynetdicom import AE, evt
        from pynetdicom.sop_class import CTImageStorage

        def keep(event: Any) -> int:
            ds = event.dataset
            self.got[str(ds.StudyInstanceUID)][str(ds.SeriesInstanceUID)][str(ds.SOPInstanceUID)] += 1
            return 0

        entity = AE(ae_title="SOAK")
        entity.add_supported_context(CTImageStorage, ["1.2.840.10008.1.2.1"])
        self._server = entity.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)]
        )

    def stop(self) -> None:
        self._server.shutdown()

    def restart(self) -> None:
        self.stop()
        self.restarts += 1
        self.start()


@dataclass
class Soaked:
    """What a soak found."""

    studies: int
    done: int
    kills: int
    seconds: float
    faults: dict[str, int]
    failures: dict[str, int]
    pacs_restarts: int
    problems: list[str]
    repeated_instances: int
    figures: list[dict[str, Any]]

    def growth(self, name: str) -> float | None:
        """Median over each worker's later batches less its second: 0 where nothing grows with the work.

        None where no worker lived for four batches, so that nothing was measured.
        """
        by_worker: dict[int, list[float]] = defaultdict(list)
        for row in self.figures:
            by_worker[row["worker"]].append(row[name])
        grown = [statistics.median(rows[len(rows) // 2 :]) - rows[1] for rows in by_worker.values() if len(rows) > 3]
        return round(max(grown), 1) if grown else None

    def as_dict(self) -> dict[str, Any]:
        """The table, without every batch's figures."""
        peak = {name: max(row[name] for row in self.figures) for name in ("rss_mib", "files", "threads")}
        grown = {f"{name}_grown": self.growth(name) for name in ("rss_mib", "files", "threads")}
        rest = {name: value for name, value in vars(self).items() if name != "figures"}
        return {**rest, "peak": peak, "grown_within_a_worker": grown, "batches": len(self.figures)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def object_store(root: Path, chance: random.Random) -> Iterator[tuple[str, Any]]:
    """An S3 server of which one request in fifty fails, one way or another."""
    from tests.support.s3_server import serve

    with serve(root / "s3") as server:
        os.environ.update(server.environment)
        kinds = ("500", "drop", "drop-answer", "507", "cut")
        server.fault = lambda number, method, path: chance.choice(kinds) if chance.randrange(50) == 0 else ""
        yield "s3://bucket/store", server


def soak(root: Path, studies: int, *, seconds: float, seed: int = 0, kill_every: tuple[int, int]) -> Soaked:
    """Run the worker, kill it at random, and look at what is left once all is done or time is up.

    Args:
        root: An empty folder.
        studies: How many; those not begun when ``seconds`` are over are left out.
        kill_every: Least and most studies that a worker interpolates or sends before it is killed: by what was done and
            not by the clock, so that a busy machine kills no worker that has done nothing.
    """
    chance, began, kills = random.Random(seed), time.perf_counter(), 0
    pacs = Pacs(free_port())
    pacs.start()
    with object_store(root, chance) as (store, server):
        while time.perf_counter() - began < seconds and not finished(root, studies):
            process = start(root, store, pacs.port, studies, seed + kills)
            wanted, pause = steps_done(root) + chance.randint(*kill_every), chance.uniform(0.0, 1.0)
            while process.poll() is None and steps_done(root) < wanted and time.perf_counter() - began < seconds:
                time.sleep(0.2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(pause)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
            if kills % 3 == 2:
                pacs.restart()
        server.fault = lambda number, method, path: ""
        begun = (begun_studies(root) + BATCH - 1) // BATCH * BATCH
        last = start(root, store, pacs.port, min(studies, begun), -1)
        assert last.wait() == 0, "the last worker failed"
        problems = judged(root, store, min(studies, begun), pacs)
        faults = {name: count for name, count in server.seen.items() if name}
    pacs.stop()
    repeats = sum(n - 1 for study in pacs.got.values() for series in study.values() for n in series.values())
    lines = (root / "figures.jsonl").read_text().splitlines()
    failures = Counter((root / "failures.log").read_text().split()) if (root / "failures.log").exists() else {}
    done, took = min(studies, begun), round(time.perf_counter() - began, 1)
    rows = [json.loads(line) for line in lines]
    return Soaked(studies, done, kills, took, faults, dict(failures), pacs.restarts, problems, repeats, rows)


def start(root: Path, store: str, port: int, studies: int, seed: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, __file__, str(root), store, str(port), str(studies), str(seed)]
    with (root / "worker.log").open("a") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT)


def steps_done(root: Path) -> int:
    """Studies begun, interpolated and sent: what moves on while a worker works."""
    return begun_studies(root) + sum(len(list((root / name).glob("*"))) for name in ("out", "sent"))


def begun_studies(root: Path) -> int:
    return len(list((root / "archive").rglob("study*.zip")))


def finished(root: Path, studies: int) -> bool:
    return len(list((root / "done").glob("*"))) * BATCH >= studies


def judged(root: Path, store_url: str, done: int, pacs: Pacs) -> list[str]:
    """What is wrong after all: empty where every study came through exactly once and nothing was left behind."""
    from latentcache import LatentStore
    from latentcache.maintenance import collect, verify

    store = LatentStore.open(store_url)
    problems = [f"verify: {problem.what}" for problem in verify(store).problems]
    roles = Counter(row.role for row in store.series() if row.status == "ok")
    if roles != {"thick": done, "thin": done}:
        problems.append(f"the catalog holds {dict(roles)} of {done} studies")
    latents = Counter((row.key, row.role) for row in store.records())
    if max(latents.values(), default=0) > 1 or len({key for key, _ in latents}) < 2 * done:
        problems.append(f"{len(latents)} latents of {done} studies, the most frequent {max(latents.values())} times")
    several = [uid for uid, series in pacs.got.items() if len(series) != 1]
    short = [uid for uid, series in pacs.got.items() for one in series.values() if len(one) != 20]
    if len(pacs.got) != done or several or short:
        problems.append(f"the PACS holds {len(pacs.got)} studies, {len(several)} twice, {len(short)} in part")
    collect(store, grace_s=-60.0)
    aside = [p.name for p in root.rglob(".*") if p.name.startswith(ASIDE)]
    if len(aside) > 2 * BATCH:
        problems.append(f"{len(aside)} files were left aside")
    return problems


if __name__ == "__main__":
    words = sys.argv[1:]
    worker(Path(words[0]), words[1], int(words[2]), int(words[3]), int(words[4]))
