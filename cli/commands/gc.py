"""``ctpipe gc``: remove what no snapshot names."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("gc")(gc)


def gc(
    store: Store,
    grace_hours: Annotated[float, typer.Option(min=0, help="Spare attempts younger than this.")] = 24.0,
    expire_snapshots: Annotated[
        bool, typer.Option("--expire-snapshots", help="Drop older snapshots that no run has pinned, too.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and stop.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove attempts without a row, fragments without a snapshot, and files that killed writers left aside.

    Whatever any snapshot or pinned run names is spared, and every attempt that may still be in flight.

    Examples:

        ctpipe gc STORE --dry-run

        ctpipe gc STORE --expire-snapshots
    """
    from latentcache import LatentStore
    from latentcache.maintenance import collect

    found = collect(
        LatentStore.open(store), grace_s=grace_hours * 3600, dry_run=dry_run, expire_snapshots=expire_snapshots
    )
    text = (
        f"{'would remove' if dry_run else 'removed'} {found.objects} objects ({found.bytes / 1e6:.1f} MB): "
        f"{found.attempts} attempts, {found.fragments} fragments, {found.snapshots} snapshots, "
        f"{found.asides} left aside"
    )
    emit({**asdict(found), "dry_run": dry_run}, text, as_json)
    return Exit.OK
