"""A file in an object store, read by ranges: listing a zip on S3 costs its directory and a few kilobytes a member."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from latentcache import missing_extra
from pipeline.archive.zip_directory import StorageError

_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
READ_ATTEMPTS = 5
_T = TypeVar("_T")


def _obstore() -> Any:
    """The package, imported where it is first needed.

    Raises:
        InputError: It is not installed.
    """
    try:
        import obstore
    except ModuleNotFoundError as error:
        raise missing_extra("obstore", "s3", "archives behind a URL") from error
    return obstore


def _client(prefix: str) -> Any:
    """An obstore store; unencrypted HTTP only where the URL or the endpoint asks for it in so many words."""
    obstore = _obstore()
    plain = [prefix, *(os.environ.get(name, "") for name in _ENDPOINTS)]
    options: dict[str, Any] = {"timeout": timedelta(seconds=60)}
    if any(text.startswith("http://") for text in plain):
        options["allow_http"] = True
    retry: Any = {
        "max_retries": 8,
        "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=5), "base": 2},
        "retry_timeout": timedelta(seconds=60),
    }
    return obstore.store.from_url(prefix, client_options=options, retry_config=retry)


class ObjectFile:
    """Random access to one object. Satisfies `archive.RangeReader`.

    The URL's scheme chooses the store (s3://, gs://, az://, http(s)://); credentials and endpoint come from the
    environment, as obstore documents them (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...).

    Raises:
        StorageError: The object is not there, or the store does not answer, now or while it is read.
    """

    def __init__(self, url: str, store: Any = None, path: str = "") -> None:
        self._obstore = obstore = _obstore()
        self._failures = (obstore.exceptions.BaseError, OSError)
        try:
            if store is None:
                prefix, _, path = url.rpartition("/")
                if "?" in prefix or "#" in prefix:
                    raise ValueError("an option, or a folder's name that is not percent-encoded")
                store = _client(prefix)
            self._store, self._path = store, path
            meta = obstore.head(store, path)
        except (*self._failures, ValueError) as error:
            raise StorageError(
                f"an object that cannot be opened ({type(error).__name__})",
                "Check the URL, the endpoint and the credentials (AWS_* variables), then run the command again.",
            ) from None
        self.size = int(meta["size"])
        self.modified_ns = int(meta["last_modified"].timestamp() * 1e9)
        self.etag = str(meta.get("e_tag") or "").strip('"')
        self.stamp = f"{self.size}:{self.etag or meta['last_modified'].isoformat()}"

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from ``offset``, fewer at the end of the object."""
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        return self._repeated(
            lambda: bytes(self._obstore.get_range(self._store, self._path, start=offset, length=length))
        )

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several ranges in concurrent requests, close ones joined into one."""
        inside = [(start, max(0, min(length, self.size - start))) for start, length in ranges]
        wanted = [(start, length) for start, length in inside if length]
        if not wanted:
            return [b"" for _ in ranges]
        starts, lengths = [start for start, _ in wanted], [length for _, length in wanted]

        def ask() -> list[bytes]:
            answers = self._obstore.get_ranges(self._store, self._path, starts=starts, lengths=lengths)
            return [bytes(answer) for answer in answers]

        found = iter(self._repeated(ask))
        return [next(found) if length else b"" for _, length in inside]

    def _repeated(self, ask: Callable[[], _T]) -> _T:
        """Again when an answer broke off: obstore repeats requests, but not bodies that have begun."""
        for attempt in range(READ_ATTEMPTS):
            try:
                return ask()
            except self._failures as error:
                broke_off = isinstance(error, self._obstore.exceptions.GenericError)
                if not broke_off or attempt == READ_ATTEMPTS - 1:
                    raise StorageError(f"the object store failed to answer ({type(error).__name__})") from None
                time.sleep(0.05 * 2**attempt)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Connections belong to the store object and end with it."""
