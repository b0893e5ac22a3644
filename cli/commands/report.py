"""``ctpipe report``: one offline HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("report")(report)


def report(
    run: Annotated[
        str,
        typer.Argument(help="A training run that `ctpipe evaluate` has been run on, or a store.", metavar="RUN|STORE"),
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where to write the page; by default report.html in RUN or STORE.")
    ] = None,
    split: Annotated[str, typer.Option(help="The evaluated split to report.")] = "test",
    private: Annotated[str | None, typer.Option(help="Where a store's private part is, if not STORE/private.")] = None,
    thumbnails: Annotated[int, typer.Option(min=0, help="Series that a store's report shows.")] = 12,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--run", help="Of a store: an evaluated run whose certificates are shown by scanner; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Write the report of a run's evaluation, or of a store's data, in one file without network.

    A run: viewer, tables, curves, provenance. A store: what was found and excluded,
    spacing, kernels, latents, reconstruction bounds.

    Examples:

        ctpipe report RUN

        ctpipe report RUN --split val --out val.html

        ctpipe report STORE --out store.html

        ctpipe report STORE --run RUN --split val
    """
    from pipeline.workflows import write_report

    path = write_report(run, out, split=split, private=private, thumbnails=thumbnails, runs=runs or ())
    emit({"report": str(path), "bytes": path.stat().st_size}, f"written {path}", as_json)
    return Exit.OK
