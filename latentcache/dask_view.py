"""A whole split's latents as one lazy dask array, for analysis. The only module here that may import dask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from latentcache.errors import InputError, missing_extra
from latentcache.records import LatentRole, Split
from latentcache.store import LatentStore

if TYPE_CHECKING:
    import dask.array


@dataclass(frozen=True)
class LatentView:
    """Latents end to end along depth: ``array`` is (C, D, h, w) float16, one dask chunk a latent.

    Latent ``keys[i]`` is in slices ``starts[i]`` to ``starts[i + 1]``.
    """

    array: dask.array.Array
    keys: tuple[str, ...]
    starts: tuple[int, ...]


def to_dask(store: LatentStore, encode_key: str, role: LatentRole = "thin", split: Split | None = None) -> LatentView:
    """Lazy view of every latent of an encoding and role, optionally of one split, in order of key.

    Raises:
        InputError: None is there, or their in-plane sizes differ.
    """
    try:
        import dask.array as da
    except ModuleNotFoundError as error:
        raise missing_extra("dask", "dask", "a lazy array over a split") from error

    group = store.zarr_group(encode_key, role, split)
    named: dict[str, Any] = dict(sorted(group.arrays()))
    keys, arrays = tuple(named), list(named.values())
    planes = {(a.shape[0], *a.shape[2:]) for a in arrays}
    if len(planes) != 1:
        raise InputError(
            f"{len(arrays)} latents with {len(planes)} different in-plane shapes",
            expected="at least one latent, all of one shape but for the depth",
            remedy="Choose another split or role, or view the latents one by one with store.zarr_array.",
        )
    # An attempt's path is of its own and never written again: as good a name as a hash over the bytes.
    paths = {r.key: r.path for r in store.select(encode_key, role, split)}
    parts = [
        da.from_array(a, chunks=a.shape, name=f"latent-{store.url}-{paths[key]}")
        for key, a in zip(keys, arrays, strict=True)
    ]
    depths = [a.shape[1] for a in arrays]
    starts = (0, *(int(n) for n in np.cumsum(depths)))
    return LatentView(da.concatenate(parts, axis=1), keys, starts)
