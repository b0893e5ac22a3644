"""Export: one consolidated Zarr v3 hierarchy with every latent of a store, and everything needed to take it back.

    OUT.zarr/                                   attributes: format, secret_fingerprint, split_seed, encodings
        series/<series_key>/                    group; attributes: the catalog row
        pairs/<pair_key>/                       group; attributes: the pair row
        latents/<encode_key>/<role>/<key>/      array (channel, z, y, x) float16; attributes: keys, positions, affine,
                                                values_sha256 (of the values, little-endian, in C order) and the row

Rows hold keyed hashes and geometry, never patient data; a latent itself decodes to a face: pseudonymous, not anonymous.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError, LatentRecord, LatentRole, LatentStore, SeriesRecord, missing_extra
from latentcache.storage import atomic_folder, sync_file, sync_folder

FORMAT = 1
CODECS = ("none", "zstd", "pcodec")
CHUNK_DEPTH = 32
"""Latent slices of one chunk, all channels: 4 MiB for a 128x128 plane, so that a window is read without the whole."""
OnLatent = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """Counts of what an export holds, and bytes before (float16) and after (all files)."""

    latents: int
    series: int
    pairs: int
    bytes_in: int
    bytes_out: int


def export_zarr(
    store: LatentStore,
    out: Path,
    *,
    codec: str = "zstd",
    encode_key: str | None = None,
    on_latent: OnLatent = lambda done, total: None,
) -> Exported:
    """Write a store's rows and latents as one Zarr hierarchy; the folder appears whole or not at all.

    Args:
        codec: ``none``, ``zstd`` (Blosc with bit shuffling) or ``pcodec``; all lossless, all followed by CRC-32C.
        encode_key: Of one encoding only; all by default.
        on_latent: Called with (latents done, of how many).

    Raises:
        InputError: An unknown codec, a package that is missing, or ``out`` exists.
        StoreError: An unknown encode key.
        CorruptLatentError: A latent differs from its checksum; nothing is left behind.
    """
    try:
        import zarr
        from zarr.storage import LocalStore
    except ImportError as error:
        raise missing_extra("zarr", "zarr", "latents as Zarr arrays, export and import") from error
    arguments = codec_arguments(codec)
    if encode_key is not None:
        store.encoding(encode_key)
    keys = [encode_key] if encode_key is not None else sorted({key for key, _ in store.encoded()})
    series, pairs = store.series(), store.pairs()
    records = [r for key in keys for role in get_args(LatentRole) for r in store.select(key, role)]
    affine_of = {s.series_key: s for s in series} | _pairs_on_thin(series, pairs)
    with atomic_folder(out) as folder, zarr_warnings():
        root = zarr.create_group(LocalStore(folder), attributes=_root_attributes(store, keys, codec))
        for name, rows in (("series", {s.series_key: s for s in series}), ("pairs", {p.pair_key: p for p in pairs})):
            for key, row in sorted(rows.items()):
                root.create_group(f"{name}/{key}", attributes=asdict(row))  # type: ignore[call-overload]
        for done, record in enumerate(records, start=1):
            values = store.read(record)
            array = root.create_array(
                f"latents/{record.encode_key}/{record.role}/{record.key}",
                shape=record.shape,
                dtype="float16",
                chunks=(record.shape[0], min(CHUNK_DEPTH, record.shape[1]), *record.shape[2:]),
                attributes=_attributes(record, values, affine_of.get(record.key)),
                dimension_names=("channel", "z", "y", "x"),
                **arguments,
            )
            array[...] = values
            on_latent(done, len(records))
        zarr.consolidate_metadata(root.store)
        bytes_out = _sync(folder)
    bytes_in = sum(2 * int(np.prod(r.shape)) for r in records)
    return Exported(len(records), len(series), len(pairs), bytes_in, bytes_out)


def values_sha256(values: NDArray[np.float16]) -> str:
    """SHA-256 of a latent's values as little-endian float16 in C order: independent of codec and chunks."""
    return hashlib.sha256(np.ascontiguousarray(values, "<f2").data).hexdigest()


def codec_arguments(codec: str) -> dict[str, Any]:
    """Arguments of zarr's ``create_array`` for one of CODECS.

    Raises:
        InputError: Another name, or the package that this codec needs is missing.
    """
    if codec not in CODECS:
        raise InputError(f"--codec {codec}", expected=", ".join(CODECS), remedy="zstd is the default.")
    require_zarr()
    from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

    if codec == "pcodec":
        require_pcodec()
        from zarr.codecs.numcodecs import PCodec

        with zarr_warnings():
            return {"filters": None, "serializer": PCodec(level=8), "compressors": [Crc32cCodec()]}
    zstd = [BloscCodec(typesize=2, cname="zstd", clevel=5, shuffle="bitshuffle")] if codec == "zstd" else []
    return {"filters": None, "serializer": BytesCodec(endian="little"), "compressors": [*zstd, Crc32cCodec()]}


def require_zarr() -> None:
    """Raise InputError, with the extra's name, where zarr is not installed."""
    import latentcache.zarr_view  # noqa: F401


def require_pcodec() -> None:
    """Raise InputError, with the extra's name, where pcodec is not installed."""
    try:
        import pcodec  # noqa: F401
    except ModuleNotFoundError as error:
        raise missing_extra("pcodec", "pcodec", "--codec pcodec and exports made with it") from error


def zarr_warnings() -> warnings.catch_warnings[Any]:
    """Silence zarr's notices that consolidated metadata and numcodecs are not in the core specification yet."""
    return warnings.catch_warnings(action="ignore")


def _root_attributes(store: LatentStore, encode_keys: Iterable[str], codec: str) -> dict[str, Any]:
    return {
        "ctpipe_export": FORMAT,
        "codec": codec,
        "secret_fingerprint": store.secret_fingerprint,
        "split_seed": store.split_seed,
        "snapshot": store.snapshot,
        "encodings": {key: store.encoding(key).to_json() for key in encode_keys},
    }


def _pairs_on_thin(series: Iterable[SeriesRecord], pairs: Iterable[Any]) -> dict[str, SeriesRecord]:
    """The thin series of each pair, whose grid the pair's own latents (thick_on_thin) have."""
    rows = {s.series_key: s for s in series}
    return {p.pair_key: rows[p.thin_key] for p in pairs if p.thin_key in rows}


def _attributes(record: LatentRecord, values: NDArray[np.float16], series: SeriesRecord | None) -> dict[str, Any]:
    from latentcache.zarr_view import latent_attributes

    geometry = {} if series is None else {"affine_lps": list(series.affine_lps), "z_mm": list(series.z_mm)}
    checksums = {"values_sha256": values_sha256(values), "shard_sha256": record.sha256}
    return {**latent_attributes(record), **geometry, **checksums}


def _sync(folder: Path) -> int:
    """Make every file and folder durable; returns the bytes of all files."""
    total = 0
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(root, name))
            total += Path(root, name).stat().st_size
        sync_folder(Path(root))
    return total
