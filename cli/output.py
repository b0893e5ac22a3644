"""What every command shares: one result on stdout, messages on stderr, and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from enum import IntEnum
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline import log_lines

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

stderr = Console(stderr=True, highlight=False)


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    QUARANTINED = 3


def progress_wanted() -> bool:
    """Progress bars are for people: only when stderr is a terminal, and not among JSON lines."""
    return sys.stderr.isatty() and not log_lines.active()


def emit(result: Mapping[str, Any], text: str, as_json: bool) -> None:
    """Print a command's result once: as JSON for machines, else the text for people."""
    typer.echo(json.dumps(result, sort_keys=True, default=str) if as_json else text)
