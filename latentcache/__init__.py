"""Latents, their records, and the store that keeps them.

In: arrays with their `Encoding`. Out: checked reads from a store that survives kills; one committing driver.
"""

import os
import sys

import lazy_loader

# Arrow's default pool, mimalloc, gives larger blocks back to the system at once, and fetching pages again for every
# column of every row group costs as much as decoding; and it keeps what threads leave when they end: a process that
# catalogues and encodes for months gained some 50 KiB a study. Arrow reads this once, when it is imported, and only so
# does it hold for what Arrow allocates by itself. Linux wheels have jemalloc; whoever has chosen keeps the choice.
if sys.platform == "linux":
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "jemalloc")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
