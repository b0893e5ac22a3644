"""S3-compatible storage through obstore: an object appears whole or not at all, and ranges are read directly."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError, StoreError, missing_extra
from latentcache.storage.base import Buffer, Entry

try:
    import obstore
    from obstore import exceptions
    from obstore.store import S3Store
except ModuleNotFoundError as error:
    raise missing_extra("obstore", "s3", "stores on s3://") from error

log = logging.getLogger("ctpipe.s3")
READ_ATTEMPTS = 5
MULTIPART_BYTES = 1 << 30
"""Below this an object goes up in one request, all or nothing; S3 takes 5 GiB in one."""


def _client(url: str) -> Any:
    """Credentials, region and endpoint come from AWS_*; transient failures are retried for up to a minute.

    Nothing in a URL decides whom to ask: one may stand in a file that somebody else wrote.
    """
    if "?" in url or "#" in url:
        raise InputError(
            "an S3 URL with ? or #",
            expected="s3://bucket/prefix; the endpoint and the like come from the AWS_* variables",
            remedy="Leave options out; write the characters themselves as %3F and %23.",
        )
    options: dict[str, Any] = {"timeout": timedelta(seconds=60)}
    if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"):
        options["allow_http"] = True
    retry: Any = {
        "max_retries": 8,
        "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=5), "base": 2},
        "retry_timeout": timedelta(seconds=60),
    }
    try:
        return S3Store.from_url(url, retry_config=retry, client_options=options)
    except (exceptions.BaseError, ValueError):
        raise InputError(
            "an S3 URL that cannot be taken apart",
            expected="s3://bucket/prefix, without empty parts",
            remedy="Check its spelling.",
        ) from None


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
    """obstore's errors as ours; theirs show request URLs and are pages long."""
    try:
        yield
    except (exceptions.NotFoundError, FileNotFoundError) as error:
        raise FileNotFoundError(path) from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StoreError(
            f"the object store refused access to {path or 'the store'}",
            expected="credentials that may read and write the bucket",
            remedy="Set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for other servers, AWS_ENDPOINT_URL.",
        ) from error
    except exceptions.BaseError as error:
        raise StoreError(
            f"the object store failed on {path or 'a listing'} ({type(error).__name__}) though it was asked repeatedly",
            expected="an answer within a minute",
            remedy="Check AWS_ENDPOINT_URL and the server, then run the command again: it resumes.",
        ) from error


def _repeated(path: str, call: Callable[[], Any]) -> Any:
    """A read, again when its answer broke off: obstore repeats requests, but not bodies that have begun."""
    for attempt in range(READ_ATTEMPTS):
        try:
            with _errors(path):
                return call()
        except StoreError as error:
            broke_off = isinstance(error.__cause__, exceptions.GenericError) and "NotPartial" not in str(
                error.__cause__
            )
            if not broke_off or attempt == READ_ATTEMPTS - 1:
                raise
            time.sleep(0.05 * 2**attempt)
    raise AssertionError("unreachable")


class S3Location:
    """A prefix of a bucket."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._store = _client(self._url)
        self._ranges = True

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
        with contextlib.suppress(FileNotFoundError):
            self.size(path)
            raise FileExistsError(path)
        data = b"".join(memoryview(b).cast("B") for b in buffers)
        try:
            with _errors(path):
                try:
                    obstore.put(self._store, path, data, mode="create", use_multipart=False)
                except (exceptions.NotSupportedError, NotImplementedError):
                    obstore.put(self._store, path, data, use_multipart=len(data) > MULTIPART_BYTES)
                except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileExistsError) as error:
                    raise FileExistsError(path) from error
        except FileExistsError:
            # A retry after a lost answer finds its own object: that is success, not a rival.
            if self.read(path) != data:
                raise

    @functools.cached_property
    def conditional(self) -> bool:
        """Whether this server refuses a put of a name that is taken, asked once with a test object."""
        path = f"probe-{uuid.uuid4().hex}"
        with _errors(path):
            try:
                for _ in range(2):
                    obstore.put(self._store, path, b"", mode="create", use_multipart=False)
            except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileExistsError):
                return True
            except (exceptions.NotSupportedError, NotImplementedError):
                pass
            finally:
                self.delete(path)
        log.warning(
            "this object store ignores conditional puts: while one ctpipe command writes to it, start no other, and do "
            "not suspend the machine that runs it"
        )
        return False

    def put(self, path: str, data: bytes) -> None:
        with _errors(path):
            obstore.put(self._store, path, data, use_multipart=len(data) > MULTIPART_BYTES)

    def read(self, path: str) -> bytes:
        return bytes(_repeated(path, lambda: obstore.get(self._store, path).bytes()))

    def read_into(self, path: str, offset: int, groups: Sequence[Sequence[NDArray[Any]]]) -> Iterator[None]:
        wanted = sum(b.nbytes for group in groups for b in group)
        data = np.frombuffer(self._range(path, offset, wanted), np.uint8)
        if data.nbytes != wanted:
            raise EOFError(f"{data.nbytes} of {wanted} bytes")
        start = 0
        for group in groups:
            for buffer in group:
                buffer.reshape(-1).view(np.uint8)[:] = data[start : start + buffer.nbytes]
                start += buffer.nbytes
            yield

    def _range(self, path: str, offset: int, length: int) -> Any:
        if self._ranges:
            try:
                return _repeated(path, lambda: obstore.get_range(self._store, path, start=offset, length=length))
            except StoreError as error:
                if "NotPartial" not in str(error.__cause__):
                    raise
                # Some servers answer a range with the status of a whole object, which obstore rightly distrusts.
                log.warning("this object store answers ranges with a wrong status: reading whole objects instead")
                self._ranges = False
        return self.read(path)[offset : offset + length]

    def size(self, path: str) -> int:
        with _errors(path):
            return int(obstore.head(self._store, path)["size"])

    def list(self, prefix: str) -> Iterator[Entry]:
        def batches() -> Any:
            return [meta for batch in obstore.list(self._store, prefix or None, chunk_size=1000) for meta in batch]

        yield from map(_entry, _repeated(prefix, batches))

    def objects(self, prefix: str) -> Sequence[Entry]:
        return [_entry(meta) for meta in self._folder(prefix)["objects"]]

    def folders(self, prefix: str) -> Sequence[str]:
        return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in self._folder(prefix)["common_prefixes"])

    def _folder(self, prefix: str) -> Any:
        return _repeated(prefix, lambda: obstore.list_with_delimiter(self._store, prefix or None))

    def delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            _repeated(path, lambda: obstore.delete(self._store, path))

    def child(self, path: str) -> S3Location:
        return S3Location(f"{self._url}/{path}")


def _entry(meta: Any) -> Entry:
    etag = str(meta.get("e_tag") or "").strip('"')
    return Entry(str(meta["path"]), int(meta["size"]), meta["last_modified"].timestamp(), etag)
