"""Progress of a job, as a workflow reports it to its caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class JobProgress:
    """Progress of one part of a job.

    Attributes:
        part: The part of the job, ``sampling`` or ``scoring`` say; one progress bar each.
        done: Items that are done.
        total: Items in all; None where that is not known.
        step: What is done at the moment, where it has a name.
    """

    part: str
    done: int = 0
    total: int | None = None
    step: str = ""


OnProgress = Callable[[JobProgress], None]
"""Function that a workflow calls with its progress, in the caller's process."""


def silent(progress: JobProgress) -> None:
    """Report nothing: the default of every workflow."""
