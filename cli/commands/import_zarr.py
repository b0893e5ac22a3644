"""``ctpipe import``: an exported Zarr hierarchy back into a store."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit, progress_bars


def register(app: typer.Typer) -> None:
    app.command("import")(import_store)


def import_store(
    source: Annotated[Path, typer.Argument(help="What `ctpipe export` wrote.")],
    store: Store,
    as_json: AsJson = False,
) -> int:
    """Take an export into a new store, or into one of the same secret and split seed.

    Every value is checked against the export's SHA-256, and every shard must come out byte for byte as it was. If it is
    interrupted, run it again: it goes on from what is committed. The private part is not in an export: `ctpipe whois`
    and `ctpipe encode` need it beside the store.

    Examples:

        ctpipe import OUT.zarr STORE
    """
    from latentcache.exchange import import_zarr
    from pipeline.workflows import JobProgress

    with progress_bars() as bars:
        done = import_zarr(source, store, on_latent=lambda n, total: bars(JobProgress("import", done=n, total=total)))
    text = (
        f"{done.latents} latents, {done.series} series and {done.pairs} pairs are new; "
        f"{done.kept} latents were there already"
    )
    emit(asdict(done), text, as_json)
    return Exit.OK
