"""The folders of the service: where images, work and results are, and how files get there whole.

STATE/private/secret          pseudonyms are made with it
STATE/private/queue.sqlite    the queue
STATE/private/spool/<study key>/<instance key>.dcm      images received
STATE/private/work/<study key>-<revision>/              one attempt at an interpolation
STATE/private/results/<study key>/<revision>/           what was made, until it is delivered and its time is over
STATE/private/lock            held by the one running service
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from latentcache import StoreError
from latentcache.storage import lock_alone, sync_folder, written_aside

GIB = 1 << 30


@dataclass(frozen=True)
class Folders:
    """Paths below a state folder."""

    state: Path

    @property
    def private(self) -> Path:
        return self.state / "private"

    @property
    def queue(self) -> Path:
        return self.private / "queue.sqlite"

    @property
    def spool(self) -> Path:
        return self.private / "spool"

    @property
    def work(self) -> Path:
        return self.private / "work"

    @property
    def results(self) -> Path:
        return self.private / "results"

    def image(self, study_key: str, sop_key: str) -> Path:
        return self.spool / study_key / f"{sop_key}.dcm"

    def result(self, study_key: str, revision: int) -> Path:
        return self.results / study_key / str(revision)

    def make(self) -> None:
        """Make what is missing, readable by the owner alone."""
        self.state.mkdir(parents=True, exist_ok=True)
        for folder in (self.private, self.spool, self.work, self.results):
            folder.mkdir(mode=0o700, exist_ok=True)
            folder.chmod(0o700)

    def lock(self) -> IO[str]:
        """Return the open lock file. Raises StoreError where another service runs on this folder."""
        path = self.private / "lock"
        file = open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w", encoding="utf-8")  # noqa: SIM115 - held while the service runs
        try:
            lock_alone(file.fileno())
        except OSError:
            file.close()
            raise StoreError(
                "another service runs on this state folder",
                expected="one service per state folder",
                remedy="Stop the other one, or give this one a folder of its own.",
            ) from None
        return file

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.private).free

    def sweep(self, images: set[tuple[str, str]], results: set[tuple[str, str]]) -> int:
        """Delete what a kill left: half-written files, images never acknowledged, unfinished work; return how many.

        Args:
            images: (study key, instance key) of every image that must be there.
            results: (study key, revision) of every result that must be there.
        """
        removed = 0
        for file in [file for folder in self.spool.iterdir() for file in folder.iterdir()]:
            if (file.parent.name, file.stem) not in images or file.suffix != ".dcm":
                file.unlink()
                removed += 1
        for result in [result for folder in self.results.iterdir() for result in folder.iterdir()]:
            if (result.parent.name, result.name) not in results:
                remove_path(result)
                removed += 1
        for attempt in list(self.work.iterdir()):
            remove_path(attempt)
            removed += 1
        for folder in [*self.spool.iterdir(), *self.results.iterdir()]:
            if not any(folder.iterdir()):
                folder.rmdir()
        return removed


def remove_path(path: Path) -> None:
    """Delete a file or a folder with all below it; what is gone already is no error."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file of mode 0600 that is whole or absent after any kill, and synced when this returns."""
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        sync_folder(path.parent.parent)
    with written_aside(path, mode=0o600) as draft:
        draft.write_bytes(data)
    sync_folder(path.parent)
