"""A file in an object store, read by ranges: listing a zip on S3 costs its directory and a few kilobytes a member."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from latentcache.errors import InputError
from pipeline.zip_directory import ArchiveError

_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")


class ObjectFile:
    """Random access to one object. Satisfies `archive.RangeReader`.

    The URL's scheme chooses the store (s3://, gs://, az://, http(s)://); credentials and endpoint come from the
    environment, as obstore documents them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).
    """

    def __init__(self, url: str, store: Any = None, path: str = "") -> None:
        import obstore

        self._obstore = obstore
        try:
            if store is None:
                prefix, _, path = url.rpartition("/")
                plain = any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS)
                store = obstore.store.from_url(prefix, client_options={"allow_http": True} if plain else None)
            self._store, self._path = store, path
            meta = obstore.head(store, path)
        except (obstore.exceptions.BaseError, ValueError, OSError) as error:
            raise InputError(
                f"an object that cannot be opened ({type(error).__name__})",
                expected="the URL of a zip in an object store that answers ranged reads",
                remedy="Check the URL, the endpoint and the credentials (AWS_* variables).",
            ) from None
        self.size = int(meta["size"])
        self.stamp = f"{self.size}:{meta.get('e_tag') or meta['last_modified'].isoformat()}"

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from ``offset``, fewer at the end of the object; raises ArchiveError when the store fails."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        try:
            return bytes(self._obstore.get_range(self._store, self._path, start=offset, length=length))
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise ArchiveError(
                f"the object store failed to answer ({type(error).__name__})", "Run the command again."
            ) from None

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges in concurrent requests, close ones joined into one."""
        inside = [(start, max(0, min(length, self.size - start))) for start, length in ranges]
        wanted = [(start, length) for start, length in inside if length]
        if not wanted:
            return [b"" for _ in ranges]
        try:
            answers = self._obstore.get_ranges(
                self._store,
                self._path,
                starts=[start for start, _ in wanted],
                lengths=[length for _, length in wanted],
            )
        except (self._obstore.exceptions.BaseError, OSError) as error:
            raise ArchiveError(
                f"the object store failed to answer ({type(error).__name__})", "Run the command again."
            ) from None
        found = iter(answers)
        return [bytes(next(found)) if length else b"" for _, length in inside]

    def close(self) -> None:
        """Connections belong to the store object and end with it."""
