"""``ctpipe verify``: every byte of a store against its checksums."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Device, Private, Store
from cli.output import AsJson, Exit, counting_bar, emit
from cli.summaries import verify_text


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    store: Store,
    snapshot: Annotated[int | None, typer.Option(help="Check the latents of this snapshot, not the last.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and hash.")] = 2,
    sources: Annotated[
        bool, typer.Option("--sources", help="Also make latents again from their archives and compare them.")
    ] = False,
    sample: Annotated[float, typer.Option(min=0, max=1, help="With --sources: share of the series to compare.")] = 1.0,
    retire: Annotated[
        bool, typer.Option("--retire", help="With --sources: take latents of another series out of the manifest.")
    ] = False,
    vae: Annotated[str, typer.Option(help="With --sources: the VAE that encoded, `tiny` or a path.")] = "tiny",
    device: Device = "auto",
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Check snapshots, tables, encodings and latents: checksums, shapes, finite values, rows against arrays both ways.

    Latents that a model generated are checked too. Exits 1 if anything is wrong. Latents that are damaged or gone are
    made anew by `ctpipe encode STORE --repair`.

    With --sources, latents are made again from their archives and compared: that finds latents of another series, which
    an archive that changed between ingest and encode could leave behind in stores of earlier versions. It costs as much
    as encoding; --sample compares a part. --retire takes what it finds out of the manifest (older snapshots keep it),
    and the next `ctpipe encode` makes it anew.

    Examples:

        ctpipe verify STORE

        ctpipe verify STORE --sources --sample 0.05

        ctpipe verify STORE --sources --retire && ctpipe encode STORE

        ctpipe verify s3://archive/store --threads 8 --json
    """
    from pipeline.workflows import VerifyJob, verify as run

    if retire and not sources:
        raise typer.BadParameter("it takes out what --sources finds", param_hint="--retire")
    job = VerifyJob(store, snapshot, threads, sources, sample, retire, vae, device, private)
    with counting_bar("sources") as show:
        facts = run(job, show)
    emit(facts, verify_text(facts), as_json)
    return Exit.OK if facts["ok"] else Exit.FAILED
