"""S3-compatible storage through obstore: whole-object puts are atomic, ranges are read directly."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.exceptions import AlreadyExistsError, NotFoundError, NotSupportedError, PreconditionError
from obstore.store import S3Store

from latentcache.location import Buffer, Entry

MULTIPART_BYTES = 64 << 20
"""Below this an object goes up in one request: all or nothing."""


def _client(url: str) -> Any:
    """Credentials, region and endpoint come from AWS_*; transient failures are retried for up to a minute."""
    options: dict[str, Any] = {}
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["client_options"] = {"allow_http": True, "timeout": timedelta(seconds=30)}
    retry: Any = {
        "max_retries": 8,
        "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=5), "base": 2},
        "retry_timeout": timedelta(seconds=60),
    }
    return S3Store.from_url(url, retry_config=retry, **options)


class S3Location:
    """A prefix of a bucket."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._store = _client(self._url)

    def __reduce__(self) -> tuple[Callable[[str], S3Location], tuple[str]]:
        return (S3Location, (self._url,))

    @property
    def url(self) -> str:
        return self._url

    def put_once(self, path: str, buffers: Sequence[Buffer]) -> None:
        """Refuses a taken name by looking first, and by a conditional put where the server honours one.

        A server may ignore the condition without saying so; then only the lease of the committing driver, and the
        random names of everything else, keep two writers apart.
        """
        try:
            self.size(path)
        except FileNotFoundError:
            pass
        else:
            raise FileExistsError(path)
        data = b"".join(memoryview(b).cast("B") for b in buffers)
        try:
            obstore.put(self._store, path, data, mode="create", use_multipart=False)
        except NotSupportedError:
            self._put(path, data)
        except (AlreadyExistsError, PreconditionError) as error:
            # A retry after a lost answer finds its own object: that is success, not a rival.
            if self.read(path) != data:
                raise FileExistsError(path) from error

    def put(self, path: str, data: bytes) -> None:
        self._put(path, data)

    def _put(self, path: str, data: bytes) -> None:
        obstore.put(self._store, path, data, use_multipart=len(data) > MULTIPART_BYTES)

    def read(self, path: str) -> bytes:
        try:
            return bytes(obstore.get(self._store, path).bytes())
        except NotFoundError as error:
            raise FileNotFoundError(path) from error

    def read_into(self, path: str, offset: int, buffers: Sequence[NDArray[Any]]) -> None:
        wanted = sum(b.nbytes for b in buffers)
        try:
            data = np.frombuffer(obstore.get_range(self._store, path, start=offset, length=wanted), np.uint8)
        except NotFoundError as error:
            raise FileNotFoundError(path) from error
        if data.nbytes != wanted:
            raise EOFError(f"{data.nbytes} of {wanted} bytes")
        start = 0
        for buffer in buffers:
            buffer.reshape(-1).view(np.uint8)[:] = data[start : start + buffer.nbytes]
            start += buffer.nbytes

    def size(self, path: str) -> int:
        try:
            return int(obstore.head(self._store, path)["size"])
        except NotFoundError as error:
            raise FileNotFoundError(path) from error

    def list(self, prefix: str) -> Iterator[Entry]:
        for batch in obstore.list(self._store, prefix or None, chunk_size=1000):
            yield from map(_entry, batch)

    def objects(self, prefix: str) -> Sequence[Entry]:
        return [_entry(meta) for meta in obstore.list_with_delimiter(self._store, prefix or None)["objects"]]

    def folders(self, prefix: str) -> Sequence[str]:
        found = obstore.list_with_delimiter(self._store, prefix or None)
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found["common_prefixes"])

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, path)

    def child(self, path: str) -> S3Location:
        return S3Location(f"{self._url}/{path}")


def _entry(meta: Any) -> Entry:
    return Entry(str(meta["path"]), int(meta["size"]), meta["last_modified"].timestamp())
