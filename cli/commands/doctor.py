"""``ctpipe doctor``: whether this machine, this store and these weights fit the run that is planned."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cli.output import AsJson, Exit, emit


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    store: Annotated[str | None, typer.Argument(help="Also look at this store and at a run on it.")] = None,
    preset: Annotated[str, typer.Option(help="The run that is planned: tiny, medium or classic.")] = "medium",
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, as for `ctpipe train`.")] = None,
    vae: Annotated[str, typer.Option(help="The VAE to look at: `tiny` or a path.")] = "tiny",
    as_json: AsJson = False,
) -> int:
    """Device, memory for the preset, VAE weights, store health, expected epoch time.

    Examples:

        ctpipe doctor

        ctpipe doctor STORE --preset medium --vae weights/autoencoder_epoch273.pt
    """
    from pipeline.workflows import REMEDIES, examine

    findings = examine(store, preset, list(set_ or []), vae)
    healthy = not any(f.level == "problem" for f in findings)
    lines = [f"{f.level:8s} {f.name:12s} {f.detail}" for f in findings]
    lines += ["", "When something goes wrong:"] + [f"  {name}: {remedy}" for name, remedy in REMEDIES.items()]
    result = {"healthy": healthy, "findings": [asdict(f) for f in findings], "remedies": REMEDIES}
    emit(result, "\n".join(lines), as_json)
    return Exit.OK if healthy else Exit.FAILED
