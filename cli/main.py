"""Entry point: registers every command module and maps exceptions to exit codes."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import sys
from typing import Any

import typer

import cli
from cli.output import Exit, stderr
from latentcache.errors import CtpipeError

app = typer.Typer(
    name="ctpipe",
    help="Thick-slice CT archives to trustworthy thin slices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# The base of every usage error, whether typer uses click or, since 0.29, carries a copy of it.
UsageError: Any = typer.BadParameter.__bases__[0]

NOT_COMMANDS = {"main", "output"}


def command_modules() -> list[str]:
    """Names of the modules under ``cli`` that define commands; each has ``register(app)``."""
    return sorted(m.name for m in pkgutil.iter_modules(cli.__path__) if m.name not in NOT_COMMANDS)


for _name in command_modules():
    importlib.import_module(f"cli.{_name}").register(app)


def main() -> None:
    """Run the command line. Errors meant for users are printed without a traceback."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        code = app(standalone_mode=False)
    except CtpipeError as error:
        stderr.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(Exit.FAILED)
    except UsageError as error:
        error.show()
        sys.exit(Exit.USAGE)
    except (typer.Abort, KeyboardInterrupt):
        stderr.print("interrupted; run the same command again to resume")
        sys.exit(130)
    sys.exit(int(code) if isinstance(code, int) else Exit.OK)


if __name__ == "__main__":
    main()
