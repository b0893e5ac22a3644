"""Memory that a million rows are decoded into."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pyarrow as pa


@contextlib.contextmanager
def pages_used_again() -> Iterator[None]:
    """Arrow allocates from jemalloc meanwhile, where it was built with it and the user chose nothing else.

    Its default, mimalloc, gives larger blocks back to the system at once; fetching pages again for every column of
    every row group costs as much as decoding, and more than 100 MB are held besides.
    """
    before = pa.default_memory_pool()
    if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
        with contextlib.suppress(NotImplementedError):
            pa.set_memory_pool(pa.jemalloc_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)
