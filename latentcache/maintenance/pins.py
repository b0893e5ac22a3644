"""Pins: a training run names the snapshot that it reads, so that gc keeps it for as long as the run may resume.

    pin(store.location, run_id, store.snapshot)      # when the run begins, and again when it resumes: the same pin
    LatentStore.open(url, snapshot=number)           # what the run reads, whatever is committed or retired since
    unpin(store.location, run_id)                    # when the run is over for good

A pin is a small file, ``pins/NAME.json``. ``ctpipe gc`` spares every snapshot that a pin names, with all fragments and
arrays that it lists; ``ctpipe status`` shows who pins what. Only ``ctpipe forget`` goes further: a patient leaves the
pinned snapshots too.
"""

from __future__ import annotations

import json
import re

from latentcache import InputError, StoreError
from latentcache.storage import Location
from latentcache.tables import has_snapshot

EXPIRING = "expiring"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def pin(location: Location, name: str, number: int) -> None:
    """Keep a snapshot under a name (a run's id, no patient data); a later pin of the same name replaces it.

    Raises:
        InputError: The name cannot be a file name.
        StoreError: There is no such snapshot.
    """
    location.put(_path(name), json.dumps({"snapshot": number}).encode())
    # The pin first, then the looks: gc marks first and then looks for pins, so that one of the two sees the other.
    why = "gc is dropping it" if _exists(location, mark_path(number)) else ""
    if not why and not has_snapshot(location, number):
        why = "it does not exist"
    if why:
        location.delete(_path(name))
        raise StoreError(
            f"snapshot {number} cannot be pinned: {why}",
            expected="a snapshot that the store still keeps",
            remedy="`ctpipe status STORE` lists them.",
        )


def unpin(location: Location, name: str) -> None:
    """Let a snapshot go; no error if the name is not pinned."""
    location.delete(_path(name))


def pinned_snapshots(location: Location) -> dict[int, list[str]]:
    """Pinned snapshot numbers, each with the names that pin it."""
    pins: dict[int, list[str]] = {}
    for entry in location.list("pins"):
        if entry.path.endswith(".json"):
            number = int(json.loads(location.read(entry.path))["snapshot"])
            pins.setdefault(number, []).append(entry.path.split("/")[-1][:-5])
    return pins


def mark_path(number: int) -> str:
    """The file by which gc says that it is about to drop a snapshot."""
    return f"{EXPIRING}/{number:08d}.json"


def _exists(location: Location, path: str) -> bool:
    try:
        location.size(path)
    except FileNotFoundError:
        return False
    return True


def _path(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"a pin name of {len(name)} characters",
            expected="up to 64 letters, digits, dots, dashes and underscores",
            remedy="Use the run's id.",
        )
    return f"pins/{name}.json"
