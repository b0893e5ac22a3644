"""Committed latents as plain Zarr: read-only arrays and groups over the store's own files, without a copy.

Nothing is written for it. An array's metadata follows from its manifest row, and its bytes are the shard that the
store holds, so that any tool that takes a `zarr.Array` reads the cache. The only module here that imports zarr.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from latentcache.errors import CorruptLatentError, InputError, missing_extra
from latentcache.records import LatentRecord
from latentcache.shard import CRC_BYTES, METADATA, SHARD, Layout
from latentcache.storage import Location

try:
    import zarr
    from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
except ModuleNotFoundError as error:
    raise missing_extra("zarr", "zarr", "latents as Zarr arrays, export and import") from error


def open_array(location: Location, record: LatentRecord) -> zarr.Array[Any]:
    """Open one committed latent as a read-only array (C, d, h, w) float16 with its position as attributes."""
    return zarr.open_array(LatentNodes(location, {"": record}), mode="r")


def open_group(location: Location, records: Iterable[LatentRecord]) -> zarr.Group:
    """Open committed latents as one read-only group: an array for each, named by its key.

    Raises:
        InputError: Two records of one key: of different roles or encodings.
    """
    nodes: dict[str, LatentRecord] = {}
    for record in records:
        if record.key in nodes:
            raise InputError(
                f"two latents of the key {record.key} for one group",
                expected="latents of one encoding and role",
                remedy="Choose the encode key and the role.",
            )
        nodes[record.key] = record
    return zarr.open_group(LatentNodes(location, nodes), mode="r")


def latent_attributes(record: LatentRecord) -> dict[str, Any]:
    """Return what a row says of its latent, as JSON: keys, positions in mm and valid size; no path, no checksum."""
    return {
        "key": record.key,
        "encode_key": record.encode_key,
        "role": record.role,
        "z0_mm": record.z0_mm,
        "dz_mm": record.dz_mm,
        "valid_zyx": list(record.valid_zyx),
        "mean": list(record.mean),
        "std": list(record.std),
        "round_trip_psnr": record.round_trip_psnr,
        "source_digest": record.source_digest,
    }


def consolidated(nodes: Mapping[str, Mapping[str, Any]], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a root group's zarr.json (Zarr v3) that carries the metadata of every node below it."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": dict(attributes),
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": dict(nodes)},
    }


class LatentNodes(Store):
    """A Zarr store, read-only, whose arrays are latents of a `LatentStore`, by name; the name "" is the root itself."""

    def __init__(self, location: Location, nodes: Mapping[str, LatentRecord]) -> None:
        super().__init__(read_only=True)
        self.location = location
        self.nodes = dict(nodes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LatentNodes):
            return False
        return other.location.url == self.location.url and other.nodes == self.nodes

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object's bytes, or a range of them; None for what no Zarr hierarchy of latents has.

        Raises:
            CorruptLatentError: A latent's bytes are missing, or its whole shard differs from its row's checksums.
        """
        node, _, name = key.rpartition("/")
        prototype = prototype or default_buffer_prototype()
        if name == METADATA:
            data = self._metadata(node)
            return None if data is None else prototype.buffer.from_bytes(_part(data, byte_range))
        if name != SHARD or node not in self.nodes:
            return None
        read = await asyncio.to_thread(self._read, self.nodes[node], byte_range)
        return prototype.buffer.from_array_like(read.view("B"))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        node, _, name = key.rpartition("/")
        return (name == SHARD and node in self.nodes) or (name == METADATA and self._metadata(node) is not None)

    @property
    def supports_writes(self) -> bool:
        return False

    @property
    def supports_deletes(self) -> bool:
        return False

    @property
    def supports_listing(self) -> bool:
        return True

    async def set(self, key: str, value: Buffer) -> None:
        raise _read_only()

    async def delete(self, key: str) -> None:
        raise _read_only()

    async def list(self) -> AsyncIterator[str]:
        for key in self._keys():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        for key in self._keys():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        below = f"{prefix.rstrip('/')}/" if prefix else ""
        for name in dict.fromkeys(k[len(below) :].split("/")[0] for k in self._keys() if k.startswith(below)):
            yield name

    def _keys(self) -> Sequence[str]:
        prefixes = [f"{name}/" if name else "" for name in self.nodes]
        root = [] if "" in self.nodes else [METADATA]
        return root + [prefix + name for prefix in prefixes for name in (METADATA, SHARD)]

    def _metadata(self, node: str) -> bytes | None:
        if node in self.nodes:
            return json.dumps(_document(self.nodes[node])).encode()
        if node:
            return None
        return json.dumps(consolidated({n: _document(r) for n, r in self.nodes.items()}, {})).encode()

    def _read(self, record: LatentRecord, byte_range: ByteRequest | None) -> NDArray[np.uint8]:
        layout = Layout(record.shape)
        start, stop = _bounds(layout.shard_bytes, byte_range)
        data = np.empty(stop - start, np.uint8)
        try:
            for _ in self.location.read_into(f"{record.path}/{SHARD}", start, [[data]]):
                pass
        except (FileNotFoundError, EOFError) as error:  # Zarr would take a missing shard for zeros
            raise _corrupt(record, "its bytes are missing or cut short") from error
        if len(data) == layout.shard_bytes and _checksums(layout, data) != record.crc32c:
            raise _corrupt(record, "its CRC-32C is another")
        return data


def _document(record: LatentRecord) -> dict[str, Any]:
    return {**json.loads(Layout(record.shape).metadata()), "attributes": latent_attributes(record)}


def _part(data: bytes, byte_range: ByteRequest | None) -> bytes:
    start, stop = _bounds(len(data), byte_range)
    return data[start:stop]


def _bounds(size: int, byte_range: ByteRequest | None) -> tuple[int, int]:
    if isinstance(byte_range, RangeByteRequest):
        return min(byte_range.start, size), min(byte_range.end, size)
    if isinstance(byte_range, OffsetByteRequest):
        return min(byte_range.offset, size), size
    if isinstance(byte_range, SuffixByteRequest):
        return max(0, size - byte_range.suffix), size
    return 0, size


def _checksums(layout: Layout, shard: NDArray[np.uint8]) -> tuple[int, ...]:
    """Return one CRC-32C for each depth chunk, channels in turn, as the row keeps them."""
    found = []
    step = layout.chunk_bytes + CRC_BYTES
    for group in range(layout.chunks):
        crc = 0
        for channel in range(layout.shape[0]):
            start = group * layout.group_bytes + channel * step
            crc = google_crc32c.extend(crc, shard[start : start + layout.chunk_bytes])
        found.append(crc)
    return tuple(found)


def _corrupt(record: LatentRecord, what: str) -> CorruptLatentError:
    return CorruptLatentError(
        f"latent {record.key} {record.role}: {what}",
        expected="the bytes that were committed",
        remedy="`ctpipe encode STORE --repair` makes it anew from its archive; `ctpipe verify STORE` lists all such.",
    )


def _read_only() -> InputError:
    return InputError(
        "a write through the Zarr view of a store",
        expected="reads only: rows and checksums would not follow",
        remedy="Copy the array, or commit latents with LatentStore.writer().",
    )
