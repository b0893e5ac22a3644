"""The rows of PRIVATE's tables: archives seen, who each series is and where its slices lie, what was excluded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

import pyarrow as pa

from pipeline.volume import SeriesPointer

Kind = Literal["archives", "series", "quarantine"]


_text, _whole = pa.string(), pa.int64()
_texts, _indices = pa.list_(_text), pa.list_(pa.int32())


def _schema(columns: dict[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


SCHEMAS: dict[Kind, pa.Schema] = {
    "archives": _schema(
        {
            "archive_key": _text,
            "url": _text,
            "size": _whole,
            "mtime_ns": _whole,
            "etag": _text,
            "digest": _text,
            "status": _text,
            "reason": _text,
            "category": _text,
            "series_keys": _texts,
        }
    ),
    "series": _schema(
        {
            "series_key": _text,
            "study_key": _text,
            "patient_key": _text,
            "series_uid": _text,
            "study_uid": _text,
            "patient_id": _text,
            "issuer": _text,
            "identity": _text,
            "sources": _texts,
            "slots": _indices,
            "members": _indices,
            "frames": _indices,
            "even": pa.bool_(),
            "seal": _text,
            "simulated": _text,
        }
    ),
    "quarantine": _schema(
        {
            "row_key": _text,
            "kind": _text,
            "key": _text,
            "patient_key": _text,
            "url": _text,
            "member": _text,
            "reason": _text,
            "detail": _text,
        }
    ),
}
UNUSABLE: Final = "unusable"
"""Status of a directory entry that could not be used when it was last seen, such as a link to nothing."""
ROW_KEY: dict[Kind, str] = {"archives": "archive_key", "series": "series_key", "quarantine": "row_key"}


@dataclass(frozen=True)
class ArchiveRow:
    """An archive as it was last seen. ``digest`` hashes the central directory (CRC-32 and size of every member).

    Of an archive that holds forgotten patients alone, only the key and the stamps remain: no ``url``.
    """

    archive_key: str
    url: str
    size: int
    mtime_ns: int
    etag: str
    digest: str
    status: Literal["ok", "quarantined", "forgotten", "unusable"]
    reason: str = ""
    category: str = ""
    series_keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class SeriesRow:
    """Identity of a series and the places of its slices; ``identity`` is DICOM keyword to value."""

    pointer: SeriesPointer
    study_key: str
    patient_key: str
    series_uid: str
    study_uid: str
    patient_id: str
    issuer: str
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class QuarantineRow:
    """Something excluded. ``detail`` may name files and members; ``reason`` may not."""

    kind: Literal["archive", "series", "patient", "member"]
    key: str
    reason: str
    patient_key: str = ""
    url: str = ""
    member: str = ""
    detail: str = ""


def series_dict(row: SeriesRow) -> dict[str, Any]:
    """A series row as its table holds it: sources named once, slices as small numbers."""
    sources = list(dict.fromkeys(source for source, _, _ in row.pointer.members))
    slot = {source: i for i, source in enumerate(sources)}
    return {
        "series_key": row.pointer.series_key,
        "study_key": row.study_key,
        "patient_key": row.patient_key,
        "series_uid": row.series_uid,
        "study_uid": row.study_uid,
        "patient_id": row.patient_id,
        "issuer": row.issuer,
        "identity": json.dumps(dict(row.identity), sort_keys=True, default=str),
        "sources": sources,
        "slots": _unless_zero([slot[source] for source, _, _ in row.pointer.members]),
        "members": [member for _, member, _ in row.pointer.members],
        "frames": _unless_zero([frame for _, _, frame in row.pointer.members]),
        "even": row.pointer.even,
        "seal": row.pointer.seal,
        "simulated": row.pointer.simulated,
    }


def pointer_of(row: Mapping[str, Any]) -> SeriesPointer:
    """The pointer that :func:`series_dict` took apart."""
    sources, zeros = row["sources"], [0] * len(row["members"])
    slices = zip(row["slots"] or zeros, row["members"], row["frames"] or zeros, strict=True)
    members = tuple((sources[s], int(m), int(f)) for s, m, f in slices)
    return SeriesPointer(
        row["series_key"],
        members,
        even=bool(row["even"]),
        series_uid=row["series_uid"],
        seal=row["seal"] or "",
        simulated=row["simulated"] or "",
    )


def _unless_zero(values: list[int]) -> list[int]:
    """Nothing in place of zeros alone: one source and one frame a file is the rule."""
    return values if any(values) else []


def archive_row(row: Mapping[str, Any]) -> ArchiveRow:
    """An archive's row as its table gives it back."""
    return ArchiveRow(**{**row, "series_keys": tuple(row["series_keys"])})


def forgotten_archive(row: ArchiveRow) -> ArchiveRow:
    """The row of an archive that holds forgotten patients alone: enough to skip it, nothing to find it by."""
    return replace(row, url="", status="forgotten", reason="", series_keys=())
