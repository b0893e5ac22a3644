"""``ctpipe send``: written series to a PACS."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.output import AsJson, Exit, advancing_bar, emit


def register(app: typer.Typer) -> None:
    app.command("send")(send)


def send(
    folders: Annotated[list[Path], typer.Argument(help="Series folders that ctpipe wrote.")],
    to: Annotated[str | None, typer.Option(help="C-STORE: AET@HOST:PORT.")] = None,
    stow: Annotated[str | None, typer.Option(help="STOW-RS: the DICOMweb service's address.")] = None,
    calling_aet: Annotated[str, typer.Option(help="Our application entity title.")] = "CTPIPE",
    attempts: Annotated[int, typer.Option(min=1, help="Tries while the PACS does not answer.")] = 4,
    as_json: AsJson = False,
) -> int:
    """Send series by C-STORE or STOW-RS. What could not be sent is listed beside each folder; run again to resume.

    Credentials for STOW-RS come from CTPIPE_STOW_AUTH (user:password or Bearer TOKEN).

    Examples:

        ctpipe send OUT/0123456789abcdef --to PACS@10.0.0.5:104

        ctpipe send OUT/* --stow https://pacs/dicom-web
    """
    from pipeline.writing.pacs import send_folder, series_files

    destination = destination_of(to, stow, calling_aet)
    total = sum(len(series_files(folder)) for folder in folders)
    with advancing_bar("sending", total) as advance:
        summaries = {
            folder.name: send_folder(folder, destination, attempts=attempts, progress=advance) for folder in folders
        }
    lines = []
    for name, summary in summaries.items():
        lines.append(f"{name}: {summary.sent} sent, {summary.already} sent before, {len(summary.left)} left")
        if summary.left:
            lines[-1] += f" ({summary.reason}); the list is in {name}.unsent.json, run again to resume"
    emit({name: asdict(s) for name, s in summaries.items()}, "\n".join(lines), as_json)
    return Exit.FAILED if any(s.left for s in summaries.values()) else Exit.OK


def destination_of(to: str | None, stow: str | None, calling_aet: str) -> Any:
    """The destination that the options name."""
    from latentcache import InputError
    from pipeline.writing.pacs import CStore, StowRs

    if (to is None) == (stow is None):
        raise typer.BadParameter("give one of --to AET@HOST:PORT and --stow URL")
    if stow is not None:
        return StowRs(stow)
    title, _, address = (to or "").rpartition("@")
    host, _, port = address.rpartition(":")
    if not (title and host and port.isdigit()):
        raise InputError(f"destination {to!r}", expected="AET@HOST:PORT", remedy="For example PACS@10.0.0.5:104.")
    return CStore(host, int(port), title, calling_aet)
