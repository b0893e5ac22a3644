"""Import: an exported Zarr hierarchy back into a store, every value against its checksum, resumed after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from latentcache import (
    CorruptLatentError,
    Encoding,
    InputError,
    LatentMeta,
    LatentRecord,
    LatentStore,
    PairRecord,
    SeriesRecord,
    StoreError,
    Writer,
)
from latentcache.checks import check_key
from latentcache.exchange.hierarchy_writer import (
    FORMAT,
    OnLatent,
    require_pcodec,
    require_zarr,
    values_sha256,
    zarr_warnings,
)
from latentcache.storage import Location
from latentcache.tables import to_table

if TYPE_CHECKING:
    import zarr

Row = TypeVar("Row", SeriesRecord, PairRecord)
AT_ONCE = 64
"""Latents of one commit: a kill loses at most so many, which the next import reads again."""
MOST_BYTES = 8 << 30
"""Of one latent: beyond any scan (512x512x3000 is 0.1 GiB); metadata that asks for more is not believed."""


@dataclass(frozen=True)
class Imported:
    """Counts of what was new to the store, and of latents that it had already."""

    latents: int
    kept: int
    series: int
    pairs: int


def import_zarr(
    source: Path, place: str | Path | Location, *, on_latent: OnLatent = lambda done, total: None
) -> Imported:
    """Take an export into a store, which is made where there is none; running it again resumes it.

    Args:
        source: What `export_zarr` wrote.
        place: No store yet, or a store of the same secret and split seed.
        on_latent: Called with (latents done, of how many).

    Raises:
        InputError: Not an export, or rows that are not what this version writes.
        StoreError: A store of another secret or split seed, or one that holds other rows of the same keys.
        CorruptLatentError: Values differ from their checksum. What was committed before stays.
    """
    root = _open(source)
    store = _matching_store(root.attrs, place)
    encodings: Any = root.attrs["encodings"]
    for key, text in encodings.items():
        if store.register_encoding(_encoding(key, text)) != key:
            raise _not_an_export(f"an encoding that does not hash to its key {key}")
    series, pairs = _rows(root, "series", SeriesRecord), _rows(root, "pairs", PairRecord)
    new_series = _new(store.series(), series, "series_key", ("patient_key", "source_digest", "shape_zyx"))
    new_pairs = _new(store.pairs(), pairs, "pair_key", ("patient_key", "thick_key", "thin_key"))
    _refuse_leaks(store.series(), new_series)
    names = sorted(_array_names(root))
    with store.writer() as writer:
        if new_series or new_pairs:
            writer.append_catalog(new_series, new_pairs)
        imported = _import_latents(store, writer, root, names, on_latent)
    return Imported(imported, len(names) - imported, len(new_series), len(new_pairs))


def _open(source: Path) -> zarr.Group:
    require_zarr()
    import zarr
    from zarr.storage import LocalStore

    metadata = source / "zarr.json"
    try:
        if '"numcodecs.pcodec"' in metadata.read_text(encoding="utf-8"):
            require_pcodec()
        with zarr_warnings():
            root = zarr.open_group(LocalStore(source, read_only=True), mode="r", use_consolidated=True)
    except (OSError, UnicodeDecodeError) as error:
        raise _not_an_export("no zarr.json that can be read") from error
    except InputError:  # a missing extra
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _not_an_export(f"metadata that zarr refuses ({type(error).__name__})") from error
    version = root.attrs.get("ctpipe_export")
    if version != FORMAT:
        raise _not_an_export("no export of ctpipe" if version is None else f"an export of format {version}")
    absent = {"secret_fingerprint", "split_seed", "encodings"} - set(root.attrs)
    if absent or not isinstance(root.attrs["encodings"], dict):
        raise _not_an_export(f"a root without {', '.join(sorted(absent)) or 'a table of encodings'}")
    return root


def _matching_store(attributes: Mapping[str, Any], place: str | Path | Location) -> LatentStore:
    """Raises StoreError: a store whose keys or splits mean something else."""
    fingerprint, seed = str(attributes["secret_fingerprint"]), int(attributes["split_seed"])
    if not LatentStore.exists(place):
        return LatentStore.create(place, secret_fingerprint=fingerprint, split_seed=seed)
    store = LatentStore.open(place)
    if (store.secret_fingerprint, store.split_seed) != (fingerprint, seed):
        raise StoreError(
            f"a store of secret fingerprint {store.secret_fingerprint} and split seed {store.split_seed}",
            expected=f"fingerprint {fingerprint} and seed {seed}, as the export's: else its keys name other patients",
            remedy="Import into a new place, or into the store that the export came from.",
        )
    return store


def _import_latents(store: LatentStore, writer: Writer, root: zarr.Group, names: list[str], on_latent: OnLatent) -> int:
    staged: list[LatentRecord] = []
    imported = 0
    for done, name in enumerate(names, start=1):
        encode_key, role, key = name.split("/")[1:]
        check_key("latent key", key)
        if store.find(key, role, encode_key) is None:  # type: ignore[arg-type]
            staged.append(_stage(store, root, name))
        if len(staged) == AT_ONCE or done == len(names):
            imported += len(writer.commit(staged))
            staged = []
        on_latent(done, len(names))
    return imported


def _stage(store: LatentStore, root: zarr.Group, name: str) -> LatentRecord:
    """Check one array's values and write them durably.

    Raises:
        CorruptLatentError: They differ from the checksum that was taken at export.
    """
    encode_key, role, key = name.split("/")[1:]
    array: Any = root[name]
    said = array.attrs
    if array.nbytes > MOST_BYTES:
        raise _not_an_export(f"a latent of {array.nbytes >> 30} GiB ({key} {role})")
    try:
        values = np.asarray(array[...])
    except (ValueError, RuntimeError, OSError) as error:
        raise _corrupt(key, role, f"cannot be decoded ({type(error).__name__})") from error
    if values.dtype != np.float16 or values_sha256(values) != said.get("values_sha256"):
        raise _corrupt(key, role, "values differ from their SHA-256")
    try:
        record = store.stage(
            values,
            LatentMeta(
                encode_key,
                key,
                role,  # type: ignore[arg-type]
                said["z0_mm"],
                said["dz_mm"],
                tuple(said["valid_zyx"]),
                said["source_digest"],
                said["round_trip_psnr"],
            ),
        )
    except (KeyError, TypeError) as error:
        raise _not_an_export(f"a latent ({key} {role}) without its position") from error
    if record.sha256 != said.get("shard_sha256"):
        raise _corrupt(key, role, "makes another shard than the one that was exported")
    return record


def _array_names(root: zarr.Group) -> Iterator[str]:
    """Names of all latents; the consolidated metadata lists them, so that one whose folder is gone is missed."""
    with zarr_warnings():
        for name, node in root.members(max_depth=None):
            if name.startswith("latents/") and hasattr(node, "shape"):
                if name.count("/") != 3:
                    raise _not_an_export(f"an array at depth {name.count('/')}")
                yield name


def _rows(root: zarr.Group, table: str, kind: type[Row]) -> list[Row]:
    """Raises InputError: other columns than this version's, or values of another type."""
    if table not in root:
        return []
    names = {f.name for f in fields(kind)}
    rows = []
    for _, group in sorted(root[table].groups()):  # type: ignore[union-attr]
        said: dict[str, Any] = dict(group.attrs)
        if set(said) != names:
            odd = ", ".join(sorted(set(said) ^ names))
            raise _not_an_export(f"a row of {table} with other columns ({odd})")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}
        rows.append(kind(**values))
        for column in (f"{table.removesuffix('s') if table == 'pairs' else table}_key", "patient_key", "study_key"):
            check_key(column, str(said[column]))
    try:
        to_table("catalog" if kind is SeriesRecord else "pairs", rows)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise _not_an_export(f"rows of {table} with values of another type") from error
    return rows


def _new(have: list[Row], given: list[Row], key: str, same: tuple[str, ...]) -> list[Row]:
    """Rows that the store has not; of the others the store's own row stays.

    Raises:
        StoreError: A row of the same key whose columns ``same`` differ: another archive under one key.
    """
    known = {getattr(row, key): row for row in have}
    for row in given:
        mine = known.get(getattr(row, key))
        odd = [name for name in same if mine is not None and getattr(mine, name) != getattr(row, name)]
        if odd:
            raise StoreError(
                f"{key} {getattr(row, key)} differs from the store's own row in {', '.join(odd)}",
                expected="the same series under the same key",
                remedy="Import into a new place, or bring the store up to date with `ctpipe ingest` first.",
            )
    return [row for row in given if getattr(row, key) not in known]


def _refuse_leaks(have: list[SeriesRecord], new: list[SeriesRecord]) -> None:
    """Raises StoreError: a patient would be in two splits."""
    splits = {s.patient_key: s.split for s in have if s.split}
    for row in new:
        if row.split and splits.setdefault(row.patient_key, row.split) != row.split:
            raise StoreError(
                f"patient {row.patient_key} is in split {splits[row.patient_key]} here and {row.split} in the export",
                expected="every patient in one split",
                remedy="Import into a new place.",
            )


def _encoding(key: str, text: Any) -> Encoding:
    try:
        return Encoding.from_json(str(text))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise _not_an_export(f"an encoding {key} that cannot be read") from error


def _corrupt(key: str, role: str, what: str) -> CorruptLatentError:
    return CorruptLatentError(
        f"exported latent {key} {role}: {what}",
        expected="the values that were exported",
        remedy="Copy the export again; what was imported before stays, and running the import again goes on from it.",
    )


def _not_an_export(what: str) -> InputError:
    return InputError(
        what, expected="a folder that `ctpipe export` of this version wrote", remedy="Export the store again."
    )
