"""Whitening: the moments that a trainer scales latents by, merged exactly from the rows of the training split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentcache.codes import positions
from latentcache.errors import InputError
from latentcache.records import COMPRESSION
from latentcache.schema import matrix
from latentcache.statistics import Moments, merge_all

if TYPE_CHECKING:
    from latentcache.store import LatentStore


ROW = ("key", "role", "valid_zyx", "mean", "std")
"""What is needed of a manifest row."""


def training_moments(store: LatentStore, encode_key: str) -> Moments:
    """Per-channel moments over the training split's thin latents under an encode key; they serve all roles.

    Raises:
        InputError: There are none.
    """

    def thin(rows: pa.Table) -> pa.ChunkedArray:
        return pc.and_(pc.equal(rows["encode_key"], encode_key), pc.equal(rows["role"], "thin"))

    return moments_of(store.manifest_table(ROW, thin), store.catalog_table(("series_key", "split")), encode_key)


def moments_of(rows: pa.Table, catalog: pa.Table, encode_key: str) -> Moments:
    """The same of rows that were read already: latents of the encode key, and the catalog's splits.

    Raises:
        InputError: None of them is of the training split.
    """
    train = catalog.filter(pc.equal(catalog["split"], "train"))["series_key"]
    thin = np.asarray(pc.equal(rows["role"], "thin"))
    table = rows.select(ROW).filter(pa.array(thin & (positions(rows["key"], train) >= 0)))
    if table.num_rows == 0:
        raise InputError(
            f"no thin latents of the training split under encode key {encode_key}",
            expected="at least one",
            remedy="Run `ctpipe encode STORE` first, or choose another encode key (`ctpipe status STORE`).",
        )
    valid, mean, std = (matrix(table, name) for name in ("valid_zyx", "mean", "std"))
    return merge_all(np.prod(-(-valid // COMPRESSION), axis=1), mean, std)
