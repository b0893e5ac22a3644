"""Entry point: registers every command module and maps exceptions to exit codes."""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import sys
from typing import Annotated, Any

import typer

import cli.commands
from cli.output import Exit, package_version, stderr
from latentcache import CtpipeError
from pipeline.engines import job_log

app = typer.Typer(
    name="ctpipe",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


# The base of every usage error, whether typer uses click or, since 0.29, carries a copy of it.
UsageError: Any = typer.BadParameter.__bases__[0]


def command_modules() -> list[str]:
    """Names of the modules under ``cli.commands``; each has ``register(app)``."""
    return sorted(m.name for m in pkgutil.iter_modules(cli.commands.__path__))


for _name in command_modules():
    importlib.import_module(f"cli.commands.{_name}").register(app)
app.registered_commands.sort(key=lambda command: str(command.name))


def show_version(wanted: bool) -> None:
    """Print the version and stop, where it was asked for."""
    if wanted:
        typer.echo(f"ctpipe {package_version()}")
        raise typer.Exit


@app.callback()
def logs(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=show_version, is_eager=True)
    ] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Log one JSON object per line on stderr; CTPIPE_LOG=json does the same.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Log more, with tracebacks of what was excluded.")] = False,
) -> None:
    """Thick-slice CT archives to trustworthy thin slices."""
    if log_json or os.environ.get(job_log.ENVIRONMENT) == "json":
        job_log.start(debug)
    elif debug:
        logging.getLogger(job_log.OURS).setLevel(logging.DEBUG)


def main() -> None:
    """Run the command line. Errors meant for users are printed without a traceback."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        code = app(standalone_mode=False)
    except CtpipeError as error:
        if job_log.active():
            logging.getLogger("ctpipe.main").error("%s", error)
        else:
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
