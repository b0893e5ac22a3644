"""System calls that not every platform has, each with what replaces it: Linux, macOS and Windows.

What is missing is looked for by name, not by platform: an interpreter of WebAssembly or an old macOS lacks some too.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BINARY = getattr(os, "O_BINARY", 0)
"""Without it Windows changes the ends of lines in what is read or written through a descriptor."""
READ_FLAGS = os.O_RDONLY | BINARY | getattr(os, "O_CLOEXEC", 0)

_seeking = threading.Lock()
"""Held while a descriptor's own position is used, where no call reads at a position."""


def read_at(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
    """Fill buffers, one after another, from a position in a file; safe for threads.

    Args:
        descriptor: Opened with `READ_FLAGS`.
        buffers: Writable, contiguous; no more than 1024 of them (Linux's limit).
        offset: Bytes from the file's start.

    Returns:
        Bytes read; fewer than asked for at the file's end, and now and then before it.
    """
    preadv = getattr(os, "preadv", None)
    if preadv is not None:
        return int(preadv(descriptor, buffers, offset))
    total = 0
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        data = bytes_at(descriptor, len(view), offset + total)
        view[: len(data)] = data
        total += len(data)
        if len(data) < len(view):
            break
    return total


def bytes_at(descriptor: int, length: int, offset: int) -> bytes:
    """Return up to ``length`` bytes from a position in a file; safe for threads."""
    pread = getattr(os, "pread", None)
    if pread is not None:
        return bytes(pread(descriptor, length, offset))
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, length)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    # Windows, the one platform with a binary flag, syncs only what is open for writing.
    descriptor = os.open(path, os.O_RDWR | BINARY if BINARY else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Make a folder's entries durable. Windows opens no folder: there the file system's journal has to do."""
    flag = getattr(os, "O_DIRECTORY", None)
    if flag is None:
        return
    descriptor = os.open(path, os.O_RDONLY | flag)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_is_gone(number: int) -> bool:
    """Return whether no process of this machine has a number any more."""
    if Path("/proc/self").exists():
        return not Path(f"/proc/{number}").exists()
    import psutil

    return not psutil.pid_exists(number)


def lock_alone(descriptor: int) -> None:
    """Lock an open file for this process until it is closed, also by a kill.

    Raises:
        OSError: Another process holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows, which locks bytes, beyond the file's end too
        import msvcrt

        locking: Any = msvcrt
        locking.locking(descriptor, locking.LK_NBLCK, 1)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def user_number() -> int | None:
    """The user's number, None where users have none (Windows)."""
    number = getattr(os, "getuid", None)
    return None if number is None else int(number())
