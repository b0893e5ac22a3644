"""ctpipe whois: who a key is."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.options import Private
from cli.output import AsJson, Exit, emit

HELP = """Tell who a patient, study, series, pair or archive key is, from the private part of the store.

Every question is written down there, with the time. This is the only command that prints a patient's name.

Examples:

  ctpipe whois store 42b23956dd2aa2c2

  ctpipe whois s3://research/store 42b23956dd2aa2c2 --private /secure/ct-private
"""


def register(app: typer.Typer) -> None:
    @app.command(help=HELP)
    def whois(
        store: Annotated[str, typer.Argument(help="The store that holds the key.")],
        key: Annotated[str, typer.Argument(help="16 hex digits.")],
        private: Private = None,
        as_json: AsJson = False,
    ) -> int:
        from latentcache import LatentStore
        from pipeline.identity import PrivateStore, whois
        from pipeline.ingest import check_secret

        opened, hidden = LatentStore.open(store), PrivateStore.open(store, private)
        check_secret(opened, hidden)
        answer = whois(hidden, key, opened)
        emit(answer.as_dict(), answer.text(), as_json)
        return Exit.OK
