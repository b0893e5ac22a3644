"""Host memory that this process may still take: what the machine has free, or its control group if that is less.

And how much it has taken at most.
"""

from __future__ import annotations

import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def free_host_bytes(cgroup: Path = CGROUP) -> int:
    """Bytes of host memory that are free to this process.

    In a container the kernel kills by the control group's limit, whatever the machine has free. Clean file pages count
    as free there: the kernel drops them first.

    Args:
        cgroup: Where the control group's files are (version 2, or version 1 below ``memory``).
    """
    import psutil

    available = int(psutil.virtual_memory().available)
    places = (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat", "inactive_file"),
        (
            cgroup / "memory" / "memory.limit_in_bytes",
            cgroup / "memory" / "memory.usage_in_bytes",
            cgroup / "memory" / "memory.stat",
            "total_inactive_file",
        ),
    )
    for limit, current, stat, droppable in places:
        if limit.exists() and (text := limit.read_text(encoding="utf-8").strip()).isdigit():
            used = int(current.read_text(encoding="utf-8")) - _entry(stat, droppable)
            available = min(available, max(0, int(text) - used))
    return available


def peak_bytes() -> int:
    """Bytes of host memory that this process has held at most; where nobody counts them, what it holds now."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        held = psutil.Process().memory_info()
        return int(getattr(held, "peak_wset", held.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # macOS counts bytes, Linux KiB


def _entry(stat: Path, name: str) -> int:
    """A number of ``memory.stat``; 0 where it is not there."""
    if not stat.exists():
        return 0
    return next(
        (int(line.split()[1]) for line in stat.read_text(encoding="utf-8").splitlines() if line.startswith(f"{name} ")),
        0,
    )
