"""store.json: what makes a place a store, written last when one is made and read first when one is opened."""

from __future__ import annotations

import json
from dataclasses import dataclass

from latentcache.errors import StoreError
from latentcache.location import Location
from latentcache.manifest import Snapshot, check_version, load_snapshot, snapshot_path
from latentcache.records import FORMAT_VERSION

STORE = "store.json"


@dataclass(frozen=True)
class Header:
    """What never changes about a store: whose secret made its keys, and the seed of its splits."""

    secret_fingerprint: str
    split_seed: int

    @classmethod
    def read(cls, location: Location) -> Header:
        """Raises StoreError: no store, an unreadable header, or another format version."""
        try:
            data = location.read(STORE)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise StoreError(
                f"there is no store at {location.url}",
                expected=f"a folder or prefix with {STORE}",
                remedy="Make one with `ctpipe ingest DATASET STORE`; if this is a copy, copy it whole.",
            ) from error
        try:
            body = json.loads(data)
            version = body["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable() from error
        check_version(version)
        try:
            return cls(body["secret_fingerprint"], body["split_seed"])
        except KeyError as error:
            raise _unreadable() from error

    def create(self, location: Location) -> Snapshot:
        """Make an empty store; returns its first snapshot.

        Raises:
            StoreError: There is one already.
        """
        body = {
            "format_version": FORMAT_VERSION,
            "secret_fingerprint": self.secret_fingerprint,
            "split_seed": self.split_seed,
        }
        empty = Snapshot(0)
        # store.json comes last: a store that has one is whole, and a creation that was killed can be repeated.
        try:
            location.put_once(snapshot_path(0), [empty.to_json()])
        except FileExistsError:
            load_snapshot(location, 0)
        try:
            location.put_once(STORE, [json.dumps(body, indent=1).encode()])
        except FileExistsError as error:
            raise StoreError(
                f"there is a store at {location.url} already",
                expected="a place without one",
                remedy="Open it, or choose another place.",
            ) from error
        return empty


def _unreadable() -> StoreError:
    return StoreError(
        f"{STORE} cannot be read",
        expected="a JSON object with format_version, secret_fingerprint and split_seed",
        remedy="Restore it from a copy of the store.",
    )


def is_store(location: Location) -> bool:
    """Whether there is a store, of whatever version."""
    try:
        location.size(STORE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
