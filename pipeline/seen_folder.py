"""That a worker writes into the driver's own output folder: the driver leaves a mark, and the worker looks for it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

from latentcache.errors import InputError


@contextlib.contextmanager
def mark(out: Path) -> Iterator[Path]:
    """A file in the output folder, by which workers know the folder; gone afterwards, and an empty folder with it."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    path = out / f".at-work-{uuid.uuid4().hex}"
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        if new:
            with contextlib.suppress(OSError):  # something was written: the folder stays
                out.rmdir()


def check_seen(mark: Path) -> None:
    """Raises InputError where the mark is not: this machine's folder of that name is another one."""
    if not mark.exists():
        raise InputError(
            "a worker does not see the output folder",
            expected="the same folder at the same path on every node",
            remedy="Mount it there, or run this on one machine alone.",
        )
