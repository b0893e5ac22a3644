"""Progress of a running job: a small file of counts in the store, which ``ctpipe status`` shows."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from latentcache import StoreError
from latentcache.storage import Location

log = logging.getLogger("ctpipe.progress")


T = TypeVar("T")


STAGES = {
    "encode": "latents committed",
    "sample": "latents committed",
    "decode": "series done",
    "evaluate": "pairs done",
}
"""Things that a job of each kind counts. Each has a separate file, so that two jobs on one store do not mix."""


class Progress:
    """A small file in the store that says how far a running job is; ``ctpipe status`` shows it. Counts only.

    ``dashboard`` is asked for the address of a page that shows more, each time: it is known once workers are there.
    """

    def __init__(
        self,
        location: Location,
        encode_key: str,
        planned: int,
        stage: str = "encode",
        dashboard: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.location, self.encode_key, self.planned = location, encode_key, planned
        self.stage, self.dashboard = stage, dashboard
        self.started = time.time()
        self._refused = False

    def note(self, attempted: int, committed: int) -> None:
        if self._refused:
            return
        body = {
            "stage": self.stage,
            "encode_key": self.encode_key,
            "planned": self.planned,
            "attempted": attempted,
            "done": committed,
            "started": self.started,
            "updated": time.time(),
            "dashboard": self.dashboard(),
        }
        try:
            self.location.put(_file(self.stage), json.dumps(body).encode())
        except (OSError, StoreError) as error:  # a job does not fail because its progress cannot be shown
            log.warning("progress cannot be written into the store: %s", type(error).__name__)
            self._refused = True

    def end(self) -> None:
        """The job is done, and nothing is left to show. A job that fails or is killed leaves its last word."""
        if not self._refused:
            self.location.delete(_file(self.stage))


def watched(items: Iterable[T], progress: Progress) -> Iterator[T]:
    """The items as they come, counted."""
    for number, item in enumerate(items, 1):
        progress.note(number, number)
        yield item
    progress.end()


def read_progress(location: Location) -> dict[str, Any] | None:
    """Return the last report of the running (or killed) job, its rate and the seconds since; None without one.

    Of several jobs it is the one that spoke last.
    """
    said = [body for stage in STAGES if (body := _said(location, stage)) is not None]
    if not said:
        return None
    body = max(said, key=lambda one: float(one["updated"]))
    took = max(body["updated"] - body["started"], 1e-9)
    rate = body["attempted"] / took
    left = body["planned"] - body["attempted"]
    return {
        **body,
        "per_second": rate,
        "seconds_left": left / rate if rate else None,
        "silent_s": time.time() - body["updated"],
    }


def _said(location: Location, stage: str) -> dict[str, Any] | None:
    try:
        body: dict[str, Any] = json.loads(location.read(_file(stage)))
    except (FileNotFoundError, ValueError):
        return None
    return {"done": body.get("latents", 0), "dashboard": None, **body}  # as an older version's job may have left it


def _file(stage: str) -> str:
    return "progress.json" if stage == "encode" else f"progress-{stage}.json"
