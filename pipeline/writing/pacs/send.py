"""Send written series to a PACS: C-STORE (DICOM PS3.4 B) or STOW-RS (PS3.18 10.5), with retries and a list to resume.

What could not be delivered is listed in a file beside the series' folder; the next send of that folder to the same
destination takes up there and removes the list when all is delivered. Sending twice is harmless: same UIDs, same bytes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from latentcache import InputError
from latentcache.storage import write_text

log = logging.getLogger("ctpipe.send")


class PacsUnavailable(Exception):  # noqa: N818 - a state of the other side, retried, not an error of ours
    """The PACS cannot be reached, or broke off; worth another try. The text names no patient."""


class Destination(Protocol):
    """Somewhere that takes DICOM files.

    ``deliver`` sends files in order and calls ``done(path)`` for each that the PACS acknowledged, or
    ``refused(path, reason)`` where it refused that file. It raises PacsUnavailable when the connection fails, and
    InputError when trying again cannot help (unknown AE title, not allowed, SOP class not accepted).
    """

    @property
    def name(self) -> str: ...

    def deliver(
        self, paths: Sequence[Path], done: Callable[[Path], None], refused: Callable[[Path, str], None]
    ) -> None: ...


@dataclass
class SendSummary:
    """Result of sending one folder; file names only."""

    destination: str
    sent: int = 0
    already: int = 0
    left: list[str] = field(default_factory=list)
    reason: str = ""


def series_files(folder: Path) -> list[Path]:
    """The DICOM files of a written series, in slice order.

    Raises:
        InputError: There are none.
    """
    files = sorted(folder.glob("*.dcm")) if folder.is_dir() else []
    if not files:
        raise InputError(
            f"no .dcm files in {folder.name!r}",
            expected="a series folder that ctpipe wrote",
            remedy="Give one of the folders below the output of `ctpipe decode` or `ctpipe interpolate`.",
        )
    return files


def left_list(folder: Path) -> Path:
    """Return the path of the list of what is left: beside the folder, so that the series itself stays as written."""
    return folder.parent / f"{folder.name}.unsent.json"


def send_folder(
    folder: Path,
    destination: Destination,
    *,
    attempts: int = 4,
    backoff_s: float = 1.0,
    progress: Callable[[int], None] | None = None,
) -> SendSummary:
    """Send a series, or what an earlier send of it to the same destination left.

    A file that the PACS refuses is not sent again in this call; a broken connection is tried ``attempts`` times with
    doubling pauses, counting anew after every file delivered.
    """
    files = series_files(folder)
    todo = _still_to_send(folder, destination.name, files)
    summary = SendSummary(destination.name, already=len(files) - len(todo))
    refusals: dict[Path, str] = {}
    failures = 0

    def done(path: Path) -> None:
        nonlocal failures
        failures = 0
        todo.remove(path)
        summary.sent += 1
        if progress is not None:
            progress(1)

    def refused(path: Path, reason: str) -> None:
        refusals[path] = reason

    while waiting := [path for path in todo if path not in refusals]:
        try:
            destination.deliver(waiting, done, refused)
        except PacsUnavailable as error:
            failures += 1
            summary.reason = str(error)
            if failures >= attempts:
                break
            pause = backoff_s * 2 ** (failures - 1)
            log.warning("%s: %s; trying again in %.1f s", destination.name, error, pause)
            time.sleep(pause)
        except InputError as error:
            summary.reason = str(error)
            break
        else:
            if [path for path in todo if path not in refusals] == waiting:
                summary.reason = "the PACS acknowledged nothing"
                break
    if refusals:
        summary.reason = f"{len(refusals)} refused: {next(iter(refusals.values()))}"
    summary.left = [path.name for path in todo]
    if not todo:
        summary.reason = ""
    _keep_left(folder, summary)
    return summary


def _still_to_send(folder: Path, destination: str, files: list[Path]) -> list[Path]:
    path = left_list(folder)
    if not path.exists():
        return list(files)
    noted = json.loads(path.read_text(encoding="utf-8"))
    if noted.get("destination") != destination:
        return list(files)
    left = set(noted["left"])
    return [file for file in files if file.name in left]


def _keep_left(folder: Path, summary: SendSummary) -> None:
    path = left_list(folder)
    if not summary.left:
        path.unlink(missing_ok=True)
        return
    text = json.dumps({"destination": summary.destination, "left": summary.left, "reason": summary.reason}, indent=1)
    write_text(path, text)
