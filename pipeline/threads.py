"""Arithmetic threads, pinned: their number changes low bits, so every backend must use the one that was asked for."""

from __future__ import annotations

_blas: int | None = None
"""Threads that this process's BLAS was last told to use; it is told once, because finding it takes milliseconds."""


def pin(threads: int) -> None:
    """Use this many threads for the arithmetic of torch and of NumPy's and SciPy's BLAS.

    OpenMP's count, torch's, is a thread's own: a new thread of an engine would fall back to all cores. Ray gives its
    workers one thread whatever the driver has, and a BLAS promises equal sums only for equal counts.
    """
    global _blas
    import torch
    from threadpoolctl import threadpool_limits

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if _blas != threads:
        threadpool_limits(limits=threads, user_api="blas")
        _blas = threads
