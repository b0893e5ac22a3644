"""``ctpipe verify``: every byte of a store against its checksums."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    store: Store,
    snapshot: Annotated[int | None, typer.Option(help="Check the latents of this snapshot, not the last.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read and hash.")] = 2,
    as_json: AsJson = False,
) -> int:
    """Check snapshots, tables, encodings and latents: checksums, shapes, finite values, rows against arrays both ways.

    Latents that a model generated are checked too. Exits 1 if anything is wrong.

    Examples:

        ctpipe verify STORE

        ctpipe verify s3://archive/store --threads 8 --json
    """
    from latentcache import LatentStore
    from latentcache.maintenance import verify as verify_store

    opened = LatentStore.open(store, snapshot)
    stores = {"": opened} | {f"generated/{n}": opened.generated(n) for n in opened.location.folders("generated")}
    problems: list[dict[str, str]] = []
    totals = dict.fromkeys(("latents", "fragments", "snapshots", "encodings", "bytes", "orphans"), 0)
    for name, each in stores.items():
        found = verify_store(each, threads=threads)
        problems += [{"store": name, "subject": p.subject, "what": p.what} for p in found.problems]
        for figure in totals:
            totals[figure] += getattr(found, figure)
    lines = [f"{p['store']}{' ' if p['store'] else ''}{p['subject']}: {p['what']}" for p in problems]
    lines.append(
        f"{totals['latents']} latents, {totals['fragments']} fragments and {totals['snapshots']} snapshots read "
        f"({totals['bytes'] / 1e9:.2f} GB): {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}; "
        f"{totals['orphans']} attempts without a row, which `ctpipe gc` takes after a day"
    )
    emit({**totals, "ok": not problems, "problems": problems}, "\n".join(lines), as_json)
    return Exit.FAILED if problems else Exit.OK
