"""Output that every command shares: one result on stdout, messages on stderr, and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline.engines import job_log

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffusion.training import Progress
    from pipeline.workflows import OnProgress

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


stderr = Console(stderr=True, highlight=False)


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    QUARANTINED = 3


def package_version() -> str:
    """Return the version of the installed package, ``unknown`` when run from a bare tree."""
    try:
        return version("ctpipe")
    except PackageNotFoundError:
        return "unknown"


def progress_wanted() -> bool:
    """Progress bars are for people: only when stderr is a terminal, and not among JSON lines."""
    return sys.stderr.isatty() and not job_log.active()


def emit(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result once: as JSON for machines, else the text for people."""
    typer.echo(json.dumps(result, sort_keys=True, default=str) if as_json else text)


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """Progress bars for a workflow, one for each part of the job; none where nobody looks."""
    from rich.progress import (
        BarColumn,
        Progress as Bars,
        TaskID,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=stderr, disable=not progress_wanted()) as bars:

        def show(now: Any) -> None:
            if now.part not in tasks:
                tasks[now.part] = bars.add_task(now.part, total=None)
            bars.update(tasks[now.part], completed=now.done, total=now.total or None, description=now.step or now.part)

        yield show


@contextmanager
def counting_bar(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar set by how many items are done and how many there are; none where nobody looks."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=stderr, disable=not progress_wanted()) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def advancing_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that takes how many more items are done."""
    done = 0
    with counting_bar(title) as show:
        show(0, total)

        def advance(more: int) -> None:
            nonlocal done
            done += more
            show(done, total)

        yield advance


@contextmanager
def training_bar(wanted: bool) -> Iterator[Callable[[Progress], None]]:
    """A progress bar with the figures that show whether a training run is well."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bars, TextColumn, TimeRemainingColumn

    figures = TextColumn("{task.description}")
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), figures)
    with Bars(*columns, console=stderr, disable=not wanted) as bars:
        task = bars.add_task("", total=None)

        def show(now: Progress) -> None:
            bars.update(task, total=now.total_steps, completed=now.step, description=_figures(now))

        yield show


def training_steps(show: OnProgress) -> Callable[[Progress], None]:
    """Show training steps among the bars of a workflow that does more than train."""
    from pipeline.workflows import JobProgress

    return lambda now: show(JobProgress("training", now.step, now.total_steps, f"training {_figures(now)}"))


def _figures(now: Progress) -> str:
    """The figures of a training step that show whether the run is well."""
    mfu = "" if now.mfu is None else f" mfu {now.mfu:.0%}"
    return (
        f"loss {now.loss:.4f} {now.samples_per_s:.1f} samples/s data wait {now.data_wait_fraction:.1%}"
        f" {now.memory_gib:.1f} GiB{mfu}"
    )
