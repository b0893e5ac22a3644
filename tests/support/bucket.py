"""An object store in memory that can be told what to do at every request: to fail, to lose an answer, to let others in.

``at`` is called with the moment and the path; whatever it does happens just then, and what it raises is the answer that
the caller gets. Moments: ``look`` and ``looked`` around the first half of a put_once, ``stored`` after its second half,
``put``, ``replaced``, ``read``, ``delete``, ``deleted``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache.storage import Entry


class Bucket:
    """A latentcache.storage.Location. With ``conditional`` a taken name is refused however late it was taken."""

    def __init__(self, conditional: bool = True) -> None:
        self.conditional = conditional
        self.objects_held: dict[str, tuple[bytes, float]] = {}
        self.at: Callable[[str, str], None] = lambda moment, path: None
        self.url = "memory://bucket"

    def put_once(self, path: str, buffers: Sequence[Any]) -> None:
        self.at("look", path)
        if path in self.objects_held:
            raise FileExistsError(path)
        self.at("looked", path)
        if self.conditional and path in self.objects_held:
            raise FileExistsError(path)
        self.objects_held[path] = (b"".join(memoryview(b).cast("B") for b in buffers), time.time())
        self.at("stored", path)

    def put(self, path: str, data: bytes) -> None:
        self.at("put", path)
        self.objects_held[path] = (data, time.time())
        self.at("replaced", path)

    def read(self, path: str) -> bytes:
        self.at("read", path)
        if path not in self.objects_held:
            raise FileNotFoundError(path)
        return self.objects_held[path][0]

    def read_into(self, path: str, offset: int, groups: Sequence[Sequence[NDArray[Any]]]) -> Iterator[None]:
        data = self.read(path)
        for group in groups:
            for buffer in group:
                part = data[offset : offset + buffer.nbytes]
                if len(part) != buffer.nbytes:
                    raise EOFError(path)
                buffer.reshape(-1).view(np.uint8)[:] = np.frombuffer(part, np.uint8)
                offset += buffer.nbytes
            yield

    def size(self, path: str) -> int:
        return len(self.read(path))

    def list(self, prefix: str) -> Iterator[Entry]:
        found = sorted(p for p in self.objects_held if not prefix or p.startswith(f"{prefix}/"))
        yield from (Entry(p, len(self.objects_held[p][0]), self.objects_held[p][1]) for p in found)

    def objects(self, prefix: str) -> Sequence[Entry]:
        depth = prefix.count("/") + 1 if prefix else 0
        return [entry for entry in self.list(prefix) if entry.path.count("/") == depth]

    def folders(self, prefix: str) -> Sequence[str]:
        depth = prefix.count("/") + 1 if prefix else 0
        return sorted({e.path.split("/")[depth] for e in self.list(prefix) if e.path.count("/") > depth})

    def delete(self, path: str) -> None:
        self.at("delete", path)
        self.objects_held.pop(path, None)
        self.at("deleted", path)

    def child(self, path: str) -> Bucket:
        raise NotImplementedError(path)
