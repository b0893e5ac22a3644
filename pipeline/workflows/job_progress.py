"""How far a job is, as a workflow reports it to whoever called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class JobProgress:
    """How far one part of a job is.

    Attributes:
        part: The part of the job, ``sampling`` or ``scoring`` say; one progress bar each.
        done: Items that are done.
        total: Items in all; None where that is not known.
        step: What is done at the moment, where it has a name of its own.
    """

    part: str
    done: int = 0
    total: int | None = None
    step: str = ""


OnProgress = Callable[[JobProgress], None]
"""What a workflow calls with its progress, in the process that called it."""


def silent(progress: JobProgress) -> None:
    """Report nothing: the default of every workflow."""
