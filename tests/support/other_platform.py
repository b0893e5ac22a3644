"""A stand-in for a platform without Linux's calls, as far as one interpreter can play it: Windows mostly.

    hide()    # then import and run the project in this process

What it takes away or changes, for calls from the project's own files alone where a library needs them:

- calls and modules that Windows has not (preadv, fork, fcntl, resource, users, mode bits) are gone;
- ``/proc`` and ``/sys`` are not there;
- a descriptor must be opened in binary mode, a folder cannot be opened, and what is open for reading is not synced;
- file names hold no ``: * ? " < > |``, and what is open can be neither replaced, renamed nor deleted;
- text files without an encoding would be read in the machine's own: an error.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import os
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS = (
    *(f"{ROOT / name}{os.sep}" for name in ("cli", "pipeline", "latentcache", "diffusion")),
    str(ROOT / "ctpipe.py"),
)
CALLS = (
    "preadv", "pwritev", "pread", "pwrite", "fork", "forkpty", "geteuid", "getuid", "getgid", "getegid", "O_DIRECTORY",
    "O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "O_SYNC", "O_TMPFILE", "sched_getaffinity", "sched_setaffinity",
    "fchmod", "fchown", "chown", "lchown", "mkfifo", "posix_fadvise", "posix_fallocate", "memfd_create",
    "copy_file_range", "sendfile", "fdatasync", "sync", "getloadavg", "uname", "killpg", "setsid", "getpgid", "nice",
    "wait3", "wait4", "register_at_fork", "sysconf", "openpty",
)  # fmt: skip
SIGNALS = ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGPIPE", "SIGSTOP", "SIGCONT")
MODULES = frozenset(("fcntl", "resource", "pwd", "grp", "termios", "pty", "syslog", "posix_ipc"))
NEEDED_FIRST = (
    "numpy", "scipy.ndimage", "scipy.optimize", "scipy.sparse.linalg", "pydicom", "pyarrow.parquet", "pyarrow.dataset",
    "typer", "rich.progress", "psutil", "yaml", "imagecodecs", "isal.isal_zlib", "google_crc32c", "safetensors",
    "threadpoolctl", "lazy_loader", "PIL.Image", "multiprocessing.connection", "concurrent.futures.process",
    "subprocess", "asyncio", "tempfile", "shutil", "sqlite3", "ssl", "http.server", "getpass", "mailbox",
)  # fmt: skip
ALSO_FIRST = ("torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch.utils.checkpoint", "torch._dynamo",
              "safetensors.torch", "torch.utils.data", "pytest")  # fmt: skip
"""Loaded before anything is taken away, where they are installed: libraries have Linux code for Linux."""
BINARY = 1 << 29
"""A bit that Linux does not use stands for O_BINARY."""
FORBIDDEN = frozenset(':*?"<>|')


class _NoModule(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide() -> None:
    """Take away, in this process and for good, what another platform has not."""
    for name in NEEDED_FIRST:
        importlib.import_module(name)
    for name in ALSO_FIRST:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
    _watch_files()
    for name in CALLS:
        if hasattr(os, name):
            delattr(os, name)
    for name in SIGNALS:
        if hasattr(signal, name):
            delattr(signal, name)
    for name in ("clock_gettime", "CLOCK_BOOTTIME", "CLOCK_MONOTONIC", "tzset"):
        delattr(time, name)
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, _NoModule())
    warnings.filterwarnings("error", category=EncodingWarning, module=r"(cli|pipeline|latentcache|diffusion|ctpipe)\b")


def _caller_is_ours() -> bool:
    """Whether the first caller outside of the standard library and this file is the project."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(OURS):
            return True
        library = name.startswith("<") or ("/lib/python" in name and "site-packages" not in name)
        if not library and name != __file__:
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _watch_files() -> None:
    real_open, real_fsync, flags_of = os.open, os.fsync, _flags_of()
    os.O_BINARY = BINARY  # type: ignore[attr-defined]

    def opened(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if _caller_is_ours():
            _check_name(path)
            _check_there(path)
            if Path(os.fsdecode(path)).is_dir():
                raise PermissionError(errno.EACCES, "a folder cannot be opened", os.fsdecode(path))
            assert flags & BINARY or _holds_nothing_yet(flags), "a descriptor in text mode changes the ends of lines"
        return real_open(path, flags & ~BINARY, *args, **options)

    def fsync(descriptor: Any) -> None:
        if _caller_is_ours():
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            if flags_of(number) & os.O_ACCMODE == os.O_RDONLY:
                raise OSError(errno.EBADF, "what is open for reading cannot be synced")
        real_fsync(descriptor)

    os.open, os.fsync = opened, fsync  # type: ignore[assignment]
    for name in ("stat", "lstat", "readlink", "scandir", "listdir"):
        setattr(os, name, _without_proc(getattr(os, name)))
    builtins.open = _without_proc(builtins.open)
    importlib.import_module("io").open = builtins.open
    for name in ("mkdir", "link", "symlink"):
        setattr(os, name, _named(getattr(os, name)))
    for name in ("replace", "rename", "unlink", "remove", "rmdir"):
        setattr(os, name, _unless_open(getattr(os, name)))


def _flags_of() -> Callable[[int], int]:
    import fcntl

    get, command = fcntl.fcntl, fcntl.F_GETFL
    return lambda descriptor: get(descriptor, command)


def _holds_nothing_yet(flags: int) -> bool:
    """An exclusive empty file that is closed at once, or a lock."""
    return bool(flags & (os.O_WRONLY | os.O_RDWR)) and not flags & os.O_TRUNC


def _check_name(path: Any) -> None:
    if isinstance(path, int):
        return
    name = os.fsdecode(path)
    if FORBIDDEN & set(name):
        raise OSError(errno.EINVAL, "a file name that Windows refuses", name)


def _check_there(path: Any) -> None:
    if not isinstance(path, int) and os.fsdecode(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(errno.ENOENT, "no such file on this platform", os.fsdecode(path))


def _without_proc(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(path: Any = ".", *args: Any, **options: Any) -> Any:
        if not isinstance(path, int) and _caller_is_ours():
            _check_there(path)
        return call(path, *args, **options)

    return checked


def _named(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **options: Any) -> Any:
        if _caller_is_ours():
            for path in args[:2]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    _check_name(path)
        return call(*args, **options)

    return checked


_scandir, _readlink, _stat = os.scandir, os.readlink, os.stat


def _unless_open(call: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **options: Any) -> Any:
        if _caller_is_ours() and "dir_fd" not in options:
            for path in args[:2]:
                _check_name(path)
                held = _open_below(os.fsdecode(path))
                if held:
                    raise PermissionError(errno.EACCES, "another part of this process has it open", held)
        return call(*args, **options)

    return checked


def _open_below(path: str) -> str:
    """A file that this process has open or mapped, at a path or below it; empty where there is none."""
    path = os.path.abspath(path)
    names = set()
    with _scandir("/proc/self/fd") as entries:
        for entry in entries:
            try:
                if stat.S_ISREG(_stat(entry.path).st_mode):
                    names.add(_readlink(entry.path))
            except OSError:
                continue
    with _io_open("/proc/self/maps", encoding="utf-8") as maps:
        names |= {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if " /" in line}
    return next((name for name in names if name == path or name.startswith(path + os.sep)), "")


_io_open = builtins.open
