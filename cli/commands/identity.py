"""Commands about whom data belongs to: ``whois`` and ``forget``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cli.options import Private
from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("whois")(whois)
    app.command("forget")(forget)


def whois(
    store: Annotated[str, typer.Argument(help="The store that holds the key.")],
    key: Annotated[str, typer.Argument(help="16 hex digits.")],
    private: Private = None,
    as_json: AsJson = False,
) -> int:
    """Tell who a patient, study, series, pair or archive key is, from the private part of the store.

    Every question is written down there, with the time. This is the only command that prints a patient's name.

    Examples:

      ctpipe whois store 42b23956dd2aa2c2

      ctpipe whois s3://research/store 42b23956dd2aa2c2 --private /secure/ct-private
    """
    from latentcache import LatentStore
    from pipeline.identity import PrivateStore, whois as look_up
    from pipeline.ingest import check_secret

    opened, hidden = LatentStore.open(store), PrivateStore.open(store, private)
    check_secret(opened, hidden)
    answer = look_up(hidden, key, opened)
    emit(answer.as_dict(), answer.text(), as_json)
    return Exit.OK


def forget(
    store: Annotated[str, typer.Argument(help="The store.")],
    patient_key: Annotated[str, typer.Argument(help="The patient's key, as the catalog lists it.")],
    private: Private = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: this cannot be undone.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove one patient from a store: catalog, pairs, latents, older snapshots, generated stores and private part.

    The patient stays out: the next ingest skips the archive, of which only a key remains. Older snapshots go
    altogether, pinned ones too: a training run that reads one has to be started anew. Source archives, training runs
    and exported DICOM lie outside the store and are yours to delete.

    Examples:

      ctpipe forget store 42b23956dd2aa2c2 --dry-run

      ctpipe forget store 42b23956dd2aa2c2 --yes
    """
    from latentcache import LatentStore
    from pipeline.identity import PrivateStore, forget as remove_patient
    from pipeline.ingest import check_secret

    opened, hidden = LatentStore.open(store), PrivateStore.open(store, private)
    check_secret(opened, hidden)
    if not (yes or dry_run):
        if not sys.stdin.isatty():
            raise typer.BadParameter("this cannot be undone: say --yes where nobody can be asked")
        typer.confirm(f"Remove patient {patient_key} for good?", abort=True, err=True)
    summary = remove_patient(opened, hidden, patient_key, dry_run)
    emit(summary.as_dict(), summary.text(), as_json)
    return Exit.OK
