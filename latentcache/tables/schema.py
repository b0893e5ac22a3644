"""Arrow schemas of the four tables, and the way from records to tables and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from latentcache import FORMAT_VERSION, InputError, LatentRecord, PairRecord, SeriesRecord, StoreError

Kind = Literal["catalog", "pairs", "manifest", "timings"]
KINDS: tuple[Kind, ...] = ("catalog", "pairs", "manifest", "timings")


def _field(name: str, kind: pa.DataType, meaning: str, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable, {"description": meaning})


def _schema(kind: Kind, columns: list[pa.Field]) -> pa.Schema:
    return pa.schema(columns, {"ctpipe.table": kind, "ctpipe.format_version": str(FORMAT_VERSION)})


def _numbers(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, False))


_text, _int, _float = pa.string(), pa.int32(), pa.float64()
_zyx_int, _zyx_float = _numbers(_int), _numbers(_float)


SCHEMAS: dict[Kind, pa.Schema] = {
    "catalog": _schema(
        "catalog",
        [
            _field("series_key", _text, "first 16 hex of the HMAC of SeriesInstanceUID and discriminator"),
            _field("study_key", _text, "HMAC of StudyInstanceUID"),
            _field("patient_key", _text, "HMAC of PatientID and issuer"),
            _field("category", _text, "label from the allow-list"),
            _field("role", _text, "thick, thin or other"),
            _field("status", _text, "ok or quarantined"),
            _field("reason", _text, "why quarantined; no patient data"),
            _field("n_slices", _int, "slices"),
            _field("shape_zyx", _zyx_int, "voxels"),
            _field("spacing_mm_zyx", _zyx_float, "from positions, mm"),
            _field("thickness_mm", _float, "SliceThickness as stated, mm"),
            _field("affine_lps", _zyx_float, "4x4, row by row: indices (z, y, x, 1) to LPS mm"),
            _field("z_mm", _zyx_float, "slice positions along the normal, mm, ascending"),
            _field("frame_key", _text, "HMAC of FrameOfReferenceUID"),
            _field("acquisition_key", _text, "one acquisition of a study"),
            _field("kernel", _text, "reconstruction kernel"),
            _field("modality", _text, "Modality"),
            _field("transfer_syntax", _text, "transfer syntax of the source"),
            _field("flags", _numbers(_text), "what is unusual but usable"),
            _field("split", _text, "train, val, test or empty"),
            _field("source_digest", _text, "over every member's CRC-32 and size"),
        ],
    ),
    "pairs": _schema(
        "pairs",
        [
            _field("pair_key", _text, "HMAC of the two series"),
            _field("study_key", _text, "HMAC of StudyInstanceUID"),
            _field("patient_key", _text, "HMAC of PatientID and issuer"),
            _field("category", _text, "label from the allow-list"),
            _field("thick_key", _text, "series key of the thick series"),
            _field("thin_key", _text, "series key of the thin series"),
            _field("overlap_mm", _zyx_float, "common extent along the normal, mm: low, high"),
            _field("split", _text, "train, val, test or empty"),
            _field("evidence", _text, "JSON: scores, other candidates, pixel proof"),
            _field("status", _text, "ok, or quarantined by the pixel proof"),
            _field("reason", _text, "why quarantined; no patient data"),
        ],
    ),
    "manifest": _schema(
        "manifest",
        [
            _field("key", _text, "series key, or pair key for thick_on_thin"),
            _field("encode_key", _text, "hash of the encoding"),
            _field("role", _text, "thin, thick or thick_on_thin"),
            _field("shape", _zyx_int, "channels, then latent slices, rows, columns"),
            _field("dtype", _text, "float16"),
            _field("path", _text, "of the Zarr array, relative to the store"),
            _field("z0_mm", _float, "centre of latent slice 0 along the normal, mm"),
            _field("dz_mm", _float, "distance between latent slices, mm"),
            _field("valid_zyx", _zyx_int, "voxels of the volume before padding"),
            _field("crc32c", _numbers(pa.uint32()), "of every depth chunk, channels in turn"),
            _field("sha256", _text, "of the shard object"),
            _field("mean", _zyx_float, "per channel over the valid latents"),
            _field("std", _zyx_float, "per channel over the valid latents, population"),
            _field("round_trip_psnr", _float, "dB, where it was measured", nullable=True),
            _field("source_digest", _text, "of the series it was made from"),
            _field("compute_dtype", _text, "float32 or bfloat16: what it was computed in"),
            _field("device_kind", _text, "cpu or cuda: what it was computed on"),
        ],
    ),
    "timings": _schema(
        "timings",
        [
            _field("key", _text, "series or pair key"),
            _field("encode_key", _text, "hash of the encoding"),
            _field("role", _text, "role of the latent, or empty"),
            _field("stage", _text, "what was timed"),
            _field("outcome", _text, "ok, or the kind of failure"),
            _field("device", _text, "device kind"),
            _field("values", pa.map_(_text, _float), "measured figures by name; times in seconds"),
        ],
    ),
}


UNIQUE: dict[Kind, tuple[str, ...]] = {
    "catalog": ("series_key",),
    "pairs": ("pair_key",),
    "manifest": ("encode_key", "key", "role"),
    "timings": (),
}
"""What identifies a row. Of catalog and pairs the last committed row counts, of the manifest the first."""


_RECORDS = {SeriesRecord: "catalog", PairRecord: "pairs", LatentRecord: "manifest"}


def to_table(kind: Kind, rows: Iterable[SeriesRecord | PairRecord | LatentRecord]) -> pa.Table:
    """Records of one kind as a table."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMAS[kind])


def timings_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows with any of key, encode_key, role, stage, outcome, device as text; every number goes into ``values``.

    Raises:
        InputError: A value that is neither; free text could carry what must not leave PRIVATE.
    """
    named = ("key", "encode_key", "role", "stage", "outcome", "device")
    out = []
    for row in rows:
        values = {name: value for name, value in row.items() if name not in named}
        for name, value in values.items():
            if not isinstance(value, (int, float)):
                raise InputError(
                    f"a timing {name!r} of type {type(value).__name__}",
                    expected=f"numbers, besides the texts {', '.join(named)}",
                    remedy="Leave it out or make it a number.",
                )
        texts = {name: str(row.get(name, "")) for name in named}
        out.append({**texts, "values": [(name, float(value)) for name, value in sorted(values.items())]})
    return pa.Table.from_pylist(out, schema=SCHEMAS["timings"])


def from_table(table: pa.Table, record: type[Any]) -> list[Any]:
    """A table's rows as records of the given dataclass; lists become tuples."""
    names = [f.name for f in fields(record)]
    columns = [_tuples(table.column(name)) for name in names]
    return [record(*row) for row in zip(*columns, strict=True)]


def _tuples(column: pa.ChunkedArray) -> list[Any]:
    values = column.to_pylist()
    return [tuple(v) for v in values] if pa.types.is_list(column.type) else values


def matrix(table: pa.Table, name: str) -> np.ndarray[tuple[int, int], np.dtype[Any]]:
    """A list column of equal lengths as an (n, length) array, without a Python object a row.

    Raises:
        InputError: The lengths differ: latents of other channel counts.
    """
    chunks = table.column(name).chunks
    column = pa.concat_arrays(chunks) if chunks else pa.array([], table.schema.field(name).type)
    values = np.asarray(column.flatten().to_numpy(zero_copy_only=False))
    length, odd = divmod(len(values), max(len(column), 1))
    if odd or not np.array_equal(np.diff(np.asarray(column.offsets)), np.full(len(column), length)):
        raise InputError(
            f"rows with unlike numbers of values in {name}",
            expected="latents of one channel count an encoding",
            remedy="Run `ctpipe verify STORE`.",
        )
    return values.reshape(len(column), length)


def check_schema(kind: Kind, found: pa.Schema, path: str) -> None:
    """Refuse a fragment of another table or format.

    Raises:
        StoreError: The columns differ from this version's.
    """
    if not found.equals(SCHEMAS[kind]):
        raise StoreError(
            f"{path} has other columns than the {kind} table of format version {FORMAT_VERSION}",
            expected=f"exactly the {len(SCHEMAS[kind].names)} columns of that table",
            remedy="Run `ctpipe migrate STORE`, or update ctpipe if the store is newer.",
        )
