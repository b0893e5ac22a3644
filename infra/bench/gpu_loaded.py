"""What the rows of gpu.py import, imported once: in the CPU mode the rows are forked from a process that has.

Without a wheel that a row needs, that row fails by itself.
"""

from __future__ import annotations

import contextlib
import importlib
import time

_begin = time.process_time()
for _module in ("gpu_speed", "gpu_correct", "gpu_commands"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_module)

CPU_SECONDS = time.process_time() - _begin
"""What the imports took, once for all rows."""
