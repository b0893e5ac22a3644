"""Arithmetic threads, pinned: their number changes low bits, so every backend must use the one that was asked for."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from latentcache import InputError
from latentcache.storage import process_is_gone

MARK = ".at-work-"


def _remove_abandoned(out: Path) -> None:
    """Delete marks that killed commands of this host left behind; living ones are spared."""
    form = re.compile(re.escape(f"{MARK}{socket.gethostname()}.") + r"(\d+)\.[0-9a-f]{32}")
    for entry in out.iterdir():
        found = form.fullmatch(entry.name)
        if found and process_is_gone(int(found[1])):
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def mark(out: Path) -> Iterator[Path]:
    """A file in the output folder, by which workers know the folder; gone afterwards, and an empty folder with it."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out)
    path = out / f"{MARK}{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
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


_blas: int | None = None
"""Threads that this process's BLAS was last set to use; it is set once, because finding it takes milliseconds."""


def pin(threads: int) -> None:
    """Use this many threads for the arithmetic of torch and of NumPy's and SciPy's BLAS.

    OpenMP's count, torch's, is a thread's own: a new thread of an engine would fall back to all cores. Ray gives its
    workers one thread whatever the driver has, and a BLAS promises equal sums only for equal counts.
    """
    global _blas
    import torch
    from threadpoolctl import threadpool_limits

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if _blas != threads:
        threadpool_limits(limits=threads, user_api="blas")
        _blas = threads
