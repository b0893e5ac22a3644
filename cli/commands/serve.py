"""``ctpipe serve``: a DICOM node and a watched folder; thick studies in, thin series out."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from cli.output import AsJson, Exit, emit, stderr


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    config: Annotated[Path, typer.Argument(help="The YAML configuration; infra/docs/serve.md explains every key.")],
    check: Annotated[bool, typer.Option("--check", help="Check the configuration and stop.")] = False,
    retry: Annotated[
        str | None, typer.Option(help="Try again what was quarantined or refused: a study key, or `all`; then stop.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Receive studies, interpolate those that the rules select, and send the results on, until it is stopped.

    SIGTERM or Ctrl-C stops it after the work in hand; a kill at any other moment loses nothing that was acknowledged.

    Examples:

        ctpipe serve serve.yaml --check

        ctpipe serve serve.yaml

        ctpipe serve serve.yaml --retry 0123456789abcdef
    """
    from pipeline.serve import Folders, Queue, Service, interpolation, read_config

    settings = read_config(config)
    if check:
        emit({"rules": [rule.name for rule in settings.rules]}, "the configuration is sound", as_json)
        return Exit.OK
    if retry is not None:
        folders = Folders(settings.state)
        folders.make()
        number = Queue(folders.queue).requeue(None if retry == "all" else retry)
        emit({"retried": number}, f"{number} to be tried again", as_json)
        return Exit.OK
    logging.getLogger("ctpipe").setLevel(min(logging.INFO, logging.getLogger("ctpipe").level or logging.INFO))
    service = Service(settings, interpolation(settings))
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    service.start()
    port = service.receiver.port if service.receiver is not None else None
    stderr.print(f"serving{f' on port {port}' if port else ''}; stop with Ctrl-C", markup=False)
    stop.wait()
    stderr.print("stopping after the work in hand")
    service.stop()
    return Exit.OK
