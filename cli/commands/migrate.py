"""``ctpipe migrate``: bring a store of an older format version to this one."""

from __future__ import annotations

import typer

from cli.options import Store
from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("migrate")(migrate)


def migrate(
    store: Store,
    as_json: AsJson = False,
) -> int:
    """Rewrite the tables of an older store in place; latents stay as they are. A current store is left alone.

    Stop every other command on the store first. If it is interrupted, run it again.

    Examples:

        ctpipe migrate STORE
    """
    from latentcache import FORMAT_VERSION
    from latentcache.maintenance import migrate as migrate_store
    from latentcache.storage import open_location

    found, rewritten = migrate_store(open_location(store))
    text = (
        f"already at format version {found}"
        if found == FORMAT_VERSION
        else f"format version {found} became {FORMAT_VERSION}: {rewritten} fragments rewritten"
    )
    emit({"from": found, "to": FORMAT_VERSION, "fragments": rewritten}, text, as_json)
    return Exit.OK
