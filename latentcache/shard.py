"""A latent's bytes: a Zarr v3 array of one shard, and the reader that is fast enough to feed a GPU from one core.

Layout (format version 1). The array (C, d, h, w) float16 is in one shard object, ``c.0.0.0.0``, beside ``zarr.json``.
Inner chunks are (1, CHUNK_DEPTH, h, w), each followed by its CRC-32C (Zarr's ``crc32c`` codec), the channels of one
depth chunk side by side; the shard index is at the end. So a depth window of all channels is one byte range, and
every inner chunk is contiguous in the result: one preadv scatters it there without a copy. Bytes are raw: see
infra/decisions/0005. Any Zarr v3 reader opens the array; this module needs no zarr.

Shape legend: C channels, d latent slices, h rows, w columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from latentcache.errors import CorruptLatentError
from latentcache.storage import Buffer, Location

CHUNK_DEPTH = 4
SHARD = "c.0.0.0.0"
METADATA = "zarr.json"
CRC_BYTES = 4


Latent = NDArray[np.float16]
Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layout:
    """Offsets in the shard of an array of this shape."""

    shape: Shape

    @property
    def chunks(self) -> int:
        """Inner chunks along depth; the last is padded with zeros."""
        return -(-self.shape[1] // CHUNK_DEPTH)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one channel's inner chunk, its checksum not counted."""
        return CHUNK_DEPTH * self.shape[2] * self.shape[3] * 2

    @property
    def group_bytes(self) -> int:
        """Bytes of one depth chunk: all channels with their checksums."""
        return self.shape[0] * (self.chunk_bytes + CRC_BYTES)

    @property
    def shard_bytes(self) -> int:
        """Bytes of the whole shard, index included."""
        return self.chunks * self.group_bytes + 16 * self.chunks * self.shape[0] + CRC_BYTES

    def index(self) -> bytes:
        """The shard index: (offset, length) of every inner chunk in C order, little-endian, then its CRC-32C."""
        channel = np.arange(self.shape[0], dtype="<u8")[:, None] * (self.chunk_bytes + CRC_BYTES)
        offset = channel + np.arange(self.chunks, dtype="<u8")[None, :] * self.group_bytes
        entries = np.stack([offset, np.full_like(offset, self.chunk_bytes + CRC_BYTES)], axis=-1)
        data: bytes = entries.astype("<u8").tobytes()
        checksum: int = google_crc32c.value(data)
        return data + checksum.to_bytes(CRC_BYTES, "little")

    def metadata(self) -> bytes:
        """The array's zarr.json."""
        channels, _, height, width = self.shape
        shard = [channels, self.chunks * CHUNK_DEPTH, height, width]
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding = {
            "chunk_shape": [1, CHUNK_DEPTH, height, width],
            "codecs": [little, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        document = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": "float16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "dimension_names": ["channel", "z", "y", "x"],
        }
        return json.dumps(document, indent=1).encode()


@dataclass(frozen=True)
class Written:
    """Checksums of a latent as stored: one CRC-32C a depth chunk (channels in turn), SHA-256 of the shard object."""

    crc32c: tuple[int, ...]
    sha256: str


def write_latent(location: Location, path: str, array: Latent) -> Written:
    """Write a contiguous (C, d, h, w) float16 array under a separate path; the data last, so that it proves both."""
    channels, depth, height, width = array.shape
    layout = Layout((channels, depth, height, width))
    buffers: list[Buffer] = []
    checksums: list[int] = []
    digest = hashlib.sha256()
    for j in range(layout.chunks):
        crc = 0
        for c in range(channels):
            chunk: Latent = array[c, j * CHUNK_DEPTH : (j + 1) * CHUNK_DEPTH]
            if len(chunk) < CHUNK_DEPTH:
                padded = np.zeros((CHUNK_DEPTH, height, width), np.float16)
                padded[: len(chunk)] = chunk
                chunk = padded
            crc = google_crc32c.extend(crc, chunk)
            buffers += [chunk, google_crc32c.value(chunk).to_bytes(CRC_BYTES, "little")]
        checksums.append(crc)
    buffers.append(layout.index())
    for buffer in buffers:
        digest.update(buffer)
    location.put_once(f"{path}/{METADATA}", [layout.metadata()])
    location.put_once(f"{path}/{SHARD}", buffers)
    return Written(tuple(checksums), digest.hexdigest())


def read_latent(
    location: Location,
    path: str,
    shape: Shape,
    crc32c: Sequence[int],
    depth: slice | None = None,
    out: Latent | None = None,
    *,
    name: str = "",
) -> Latent:
    """Read slices ``depth`` (step 1) of a latent and check every depth chunk touched.

    Args:
        out: C-contiguous float16 array of the result's shape to fill (a pinned buffer); a new one by default.
        name: Series key and role, for the error.

    Raises:
        CorruptLatentError: Bytes are missing or differ from their checksum.
    """
    layout = Layout(shape)
    start, stop, step = (depth or slice(None)).indices(shape[1])
    if step != 1 or stop <= start:
        raise ValueError(f"depth slice {depth} of {shape[1]} latent slices: want a non-empty range of step 1")
    wanted = (shape[0], stop - start, *shape[2:])
    result = np.empty(wanted, np.float16) if out is None else out
    if result.shape != wanted or result.dtype != np.float16 or not result.flags.c_contiguous:
        raise ValueError(f"out is {result.shape} {result.dtype}: want contiguous float16 {wanted}")
    first, last = start // CHUNK_DEPTH, -(-stop // CHUNK_DEPTH)
    groups, copies = _scatter(layout, result, start, stop, first, last)
    ignored = np.empty(CRC_BYTES, np.uint8)
    buffers: list[list[NDArray[Any]]] = [[b for part in group for b in (part, ignored)] for group in groups]
    extend = google_crc32c.extend
    j = first
    try:
        # Group by group, so that the checksum finds the bytes in the cache: half as fast again as all at once.
        for _ in location.read_into(f"{path}/{SHARD}", first * layout.group_bytes, buffers):
            crc = 0
            for part in groups[j - first]:
                crc = extend(crc, part)
            if crc != crc32c[j]:
                low = j * CHUNK_DEPTH
                raise _corrupt(name, f"CRC-32C of latent slices {low}..{low + CHUNK_DEPTH - 1} is {crc:08x}")
            j += 1
    except (FileNotFoundError, EOFError) as error:
        raise _corrupt(name, "its bytes are missing or cut short") from error
    for target, source in copies:
        target[...] = source
    return result


def _scatter(
    layout: Layout, result: Latent, start: int, stop: int, first: int, last: int
) -> tuple[list[list[Latent]], list[tuple[Latent, Latent]]]:
    """Destinations in shard order, those of one depth chunk together.

    Chunks that stick out of the window land in scratch, to be copied in once checked.
    """
    groups: list[list[Latent]] = []
    copies: list[tuple[Latent, Latent]] = []
    for j in range(first, last):
        low = j * CHUNK_DEPTH
        inside = low >= start and low + CHUNK_DEPTH <= stop
        a, b = max(low, start), min(low + CHUNK_DEPTH, stop)
        parts: list[Latent] = []
        for c in range(layout.shape[0]):
            target = result[c, a - start : b - start]
            if inside:
                parts.append(target)
            else:
                scratch = np.empty((CHUNK_DEPTH, *layout.shape[2:]), np.float16)
                parts.append(scratch)
                copies.append((target, scratch[a - low : b - low]))
        groups.append(parts)
    return groups, copies


def restore_latent(location: Location, damaged: str, remade: str, shape: Shape) -> None:
    """Put an attempt's bytes back under the path of another that was lost; the caller knows that they are equal."""
    location.put(f"{damaged}/{METADATA}", Layout(shape).metadata())
    location.put(f"{damaged}/{SHARD}", location.read(f"{remade}/{SHARD}"))


def _corrupt(name: str, what: str) -> CorruptLatentError:
    return CorruptLatentError(
        f"latent {name}: {what}",
        expected="the bytes that were committed",
        remedy="`ctpipe encode STORE --repair` makes it anew from its archive; `ctpipe verify STORE` lists all such.",
    )
