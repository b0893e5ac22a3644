"""The interface of a place that holds a store's files, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

Buffer = Any
"""bytes or a C-contiguous array: what memoryview accepts."""
TEMPORARY = ".aside-"


@dataclass(frozen=True)
class Entry:
    """A stored object: path relative to the location, bytes, and when it was last written (seconds since 1970).

    ``etag`` changes with the content; empty where the place keeps none, as file systems do.
    """

    path: str
    size: int
    modified: float
    etag: str = ""


class Location(Protocol):
    """Operations that the store needs of a file system. Paths are relative, with forward slashes."""

    @property
    def url(self) -> str: ...

    def put_once(self, path: str, buffers: Sequence[Buffer]) -> None:
        """Store an object that must not exist yet, durably. Raises FileExistsError if the name is taken."""

    def put(self, path: str, data: bytes) -> None:
        """Store or replace an object, durably and at once: the lease, pins, and snapshots that are dropped."""

    def read(self, path: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""

    def read_into(self, path: str, offset: int, groups: Sequence[Sequence[NDArray[Any]]]) -> Iterator[None]:
        """Fill contiguous buffers, in turn, from one byte range.

        Yields after every group, whose bytes are still in the processor's cache then. Raises FileNotFoundError,
        EOFError.
        """

    def size(self, path: str) -> int:
        """Bytes of an object. Raises FileNotFoundError."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Every object below a folder, at any depth, in order of path."""

    def objects(self, prefix: str) -> Sequence[Entry]:
        """Objects directly in a folder."""

    def folders(self, prefix: str) -> Sequence[str]:
        """Names of the folders directly below a folder, sorted."""

    def delete(self, path: str) -> None:
        """Remove an object; no error if it is not there."""

    def child(self, path: str) -> Location:
        """The location of a folder below."""
