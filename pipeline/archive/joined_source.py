"""Several archives seen as one, for a series whose slices are spread over them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

from latentcache import InputError
from pipeline.archive.source import ClosedAfterUse, Scratch, Source
from pipeline.archive.zip_directory import Member


class JoinedSource(ClosedAfterUse):
    """Members of several sources, numbered through. Satisfies :class:`pipeline.archive.source.Source`."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.url = "joined:"
        self._sources = tuple(sources)
        tables = [source.members() for source in sources]
        # Numbers within a source may have gaps: reserve up to the largest.
        widths = [max((m.index for m in table), default=-1) + 1 for table in tables]
        self._starts = [0, *accumulate(widths)][: len(widths)]
        self._members = [
            replace(member, index=member.index + start)
            for table, start in zip(tables, self._starts, strict=True)
            for member in table
        ]

    def origin(self, index: int) -> tuple[str, int]:
        """URL of the source that holds a member, and the member's number there."""
        which = bisect_right(self._starts, index) - 1
        return self._sources[which].url, index - self._starts[which]

    @property
    def digest(self) -> str:
        return "+".join(source.digest for source in self._sources)

    @property
    def stamp(self) -> str:
        return "+".join(source.stamp for source in self._sources)

    def members(self) -> Sequence[Member]:
        return self._members

    def read(self, index: int, limit: int | None = None) -> bytes:
        which = bisect_right(self._starts, index) - 1
        return self._sources[which].read(index - self._starts[which], limit)

    def read_into(self, index: int, scratch: Scratch) -> memoryview:
        which = bisect_right(self._starts, index) - 1
        return self._sources[which].read_into(index - self._starts[which], scratch)

    def heads(self, indices: Sequence[int], limit: int) -> Iterator[tuple[int, bytes | InputError]]:
        for which, start in enumerate(self._starts):
            end = self._starts[which + 1] if which + 1 < len(self._starts) else float("inf")
            own = [index - start for index in indices if start <= index < end]
            for index, head in self._sources[which].heads(own, limit):
                yield index + start, head

    def close(self) -> None:
        for source in self._sources:
            source.close()
