"""Output folders that are whole or absent: written aside, synced, then renamed into place."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentcache import InputError
from latentcache.storage.planted_links import fresh_draft
from latentcache.storage.system_calls import process_is_gone, sync_file, sync_folder


@contextmanager
def written_aside(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a hidden sibling to write into; on success it replaces ``path``, on any error it vanishes.

    A kill at any instant leaves ``path`` as it was or as it shall be, and at worst a hidden ``*.part`` sibling, which
    the next writer of the same file replaces. A link planted in its place is not followed. ``mode`` is that of a new
    file, less the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = fresh_draft(path.with_name(f".{path.name}.part"), mode)
    try:
        yield draft
        sync_file(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; folders above it are made."""
    with written_aside(path) as draft:
        draft.write_text(text, encoding="utf-8")


def refuse_existing(path: Path) -> None:
    """Raise InputError when an output path is taken, by a link to nothing too; nothing is ever overwritten."""
    if os.path.lexists(path):
        raise InputError(
            f"the output folder {path.name!r} exists",
            expected="a path that does not exist yet",
            remedy="Choose another output folder or remove this one.",
        )


def _remove_abandoned(out_dir: Path) -> None:
    """Delete what a killed writer of the same folder on this host left behind; living writers are spared."""
    form = re.compile(re.escape(f".{out_dir.name}.{socket.gethostname()}.") + r"(\d+)(\.[0-9a-f]+)?\.partial")
    for entry in out_dir.parent.iterdir():
        found = form.fullmatch(entry.name)
        if found and process_is_gone(int(found[1])):
            shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def atomic_folder(out_dir: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write into; on success it becomes ``out_dir``, on any error it vanishes.

    Files must be synced by whoever writes them. A kill at any instant leaves ``out_dir`` whole or absent, and at worst
    a hidden ``*.partial`` sibling, which the next writer of the same folder removes.

    Raises:
        InputError: ``out_dir`` exists.
    """
    refuse_existing(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out_dir)
    # Of a name that nobody can foresee, so that nothing can be planted under it.
    own = f".{out_dir.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.partial"
    partial = out_dir.parent / own
    partial.mkdir()
    try:
        yield partial
        sync_folder(partial)
        refuse_existing(out_dir)
        os.rename(partial, out_dir)
        sync_folder(out_dir.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
