"""Requirements of ``torch.compile`` and Triton's kernels: they build a small C module when they first run."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from latentcache import InputError


def what_compilation_lacks() -> list[str]:
    """Return what is missing, in words; empty where compilation can run."""
    missing = []
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        missing.append("C compiler")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python header files")
    return missing


def check_compilation() -> None:
    """Refuse ``optimiser.compile`` before the first step where it cannot work.

    Raises:
        InputError: What is missing, and how to install it or go on without.
    """
    if missing := what_compilation_lacks():
        raise InputError(
            f"optimiser.compile without a {' and without '.join(missing)}",
            expected="what torch.compile builds its kernels with",
            remedy="Install gcc and Python's headers (apt-get install gcc libc6-dev python3-dev), or --set "
            "optimiser.compile=false.",
        )
