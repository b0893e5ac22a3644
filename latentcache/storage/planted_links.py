"""Symbolic links that another user planted where a file or folder is about to be written: never followed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from latentcache import StoreError

SUPERUSER = 0


def is_foreign(path: Path, *, follow: bool = False) -> bool:
    """Return whether what is at a path belongs to neither this user nor the superuser; False where nothing does.

    Args:
        path: Where to look.
        follow: Ask of the target of a link instead of the link itself.
    """
    if not hasattr(os, "geteuid"):
        return False
    try:
        info = os.stat(path, follow_symlinks=follow)
    except OSError:
        return False
    return info.st_uid not in (SUPERUSER, os.geteuid())


def _owner(path: Path) -> int | None:
    try:
        return os.lstat(path).st_uid
    except OSError:
        return None


def refuse_planted(path: Path, below: Path | None = None) -> None:
    """Raise where a path, or a folder between it and ``below``, is a link that another user made.

    Links of the user's own, to a larger disk for instance, are followed as ever, and so are those of the owner of
    ``below``, who has everything there in hand.

    Raises:
        StoreError: Names neither the link nor its target.
    """
    owner = _owner(below) if below is not None else None
    while True:
        if is_foreign(path) and _owner(path) != owner and stat.S_ISLNK(os.lstat(path).st_mode):
            raise StoreError(
                "a link that another user made, at a place where this command writes",
                expected="folders that only this user or the superuser links elsewhere",
                remedy="Look where it leads, remove it, and take the right to write there from others.",
            )
        if below is None or path == below or path == path.parent:
            return
        path = path.parent


def fresh_draft(path: Path, mode: int = 0o666) -> Path:
    """Return the path of a new, empty file to write into; what lay there, a link for instance, is removed first.

    Raises:
        OSError: It cannot be removed, as in a folder whose sticky bit protects another user's entries, or made.
    """
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    return path
