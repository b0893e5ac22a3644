"""Single files that are whole or as they were: written aside, synced, then renamed over the old one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.atomic_folder import sync_file


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling to write into; on success it replaces ``path``, on any error it vanishes.

    A kill at any instant leaves ``path`` as it was or as it shall be, and at worst a hidden ``*.part`` sibling, which
    the next writer of the same file overwrites.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.part")
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
