"""A whole split's latents as one lazy dask array, for analysis. The only module here that may import dask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from latentcache.errors import InputError
from latentcache.records import PAIR_ROLES, LatentRecord, LatentRole, Split
from latentcache.store import LatentStore

if TYPE_CHECKING:
    import dask.array


@dataclass(frozen=True)
class LatentView:
    """Latents end to end along depth: ``array`` is (C, D, h, w) float16, one dask chunk a latent.

    Latent ``keys[i]`` lies in slices ``starts[i]`` to ``starts[i + 1]``.
    """

    array: dask.array.Array
    keys: tuple[str, ...]
    starts: tuple[int, ...]


def to_dask(store: LatentStore, encode_key: str, role: LatentRole = "thin", split: Split | None = None) -> LatentView:
    """Lazy view of every latent of an encoding and role, optionally of one split, in order of key.

    Raises:
        InputError: None is there, or their in-plane sizes differ.
    """
    import dask.array as da
    from dask.base import tokenize
    from dask.highlevelgraph import HighLevelGraph

    rows = sorted(store.records(encode_key, role), key=lambda r: r.key)
    if split is not None:
        wanted = _keys_of_split(store, role, split)
        rows = [r for r in rows if r.key in wanted]
    planes = sorted({(r.shape[0], *r.shape[2:]) for r in rows})
    if len(planes) != 1:
        raise InputError(
            f"{len(rows)} latents with {len(planes)} different in-plane shapes",
            expected="at least one latent, all of one shape but for the depth",
            remedy="Choose another split or role, or view the latents one by one with store.read.",
        )
    depths = tuple(r.shape[1] for r in rows)
    channels, height, width = planes[0]
    name = f"latents-{tokenize(store.url, [r.path for r in rows])}"
    graph = {(name, 0, i, 0, 0): (_read, store, row) for i, row in enumerate(rows)}
    array = da.Array(
        HighLevelGraph.from_collections(name, graph),
        name,
        chunks=((channels,), depths, (height,), (width,)),
        dtype=np.float16,
    )
    starts = (0, *(int(n) for n in np.cumsum(depths)))
    return LatentView(array, tuple(r.key for r in rows), starts)


def _read(store: LatentStore, row: LatentRecord) -> Any:
    return store.read(row)


def _keys_of_split(store: LatentStore, role: LatentRole, split: Split) -> set[str]:
    if role in PAIR_ROLES:
        return {p.pair_key for p in store.pairs() if p.split == split}
    return {s.series_key for s in store.series() if s.split == split}
