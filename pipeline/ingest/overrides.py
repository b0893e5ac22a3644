"""The user's CSVs: which series pair (``--pairs``), who goes to which split (``--splits``), what to leave out.

A row may name a thing by its key, by its DICOM identifier or, for archives, by its path below the dataset or its file
name. Errors name the file's option and the line, never the content: it may identify a patient.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from latentcache import InputError, Split
from pipeline.identity import Keys

SPLITS: dict[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "test"}
EXCLUDED = "left out by the user's list"


@dataclass(frozen=True)
class Overrides:
    """A user's decisions, by key. ``archives`` are names as written; the others are 16-hex keys."""

    pairs: tuple[tuple[str, str], ...] = ()
    """(thick series key, thin series key)."""
    splits: Mapping[str, Split] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()
    """Keys of patients, studies and series."""
    archives: frozenset[str] = field(default=frozenset(), repr=False)

    def excludes_archive(self, url: str, dataset: str) -> bool:
        """Whether an archive is named: by its path below the dataset, its file name, or that without the suffix."""
        if not self.archives:
            return False
        path = PurePosixPath(url)
        base = PurePosixPath(str(Path(dataset).absolute()) if "://" not in dataset else dataset.rstrip("/"))
        names = {path.name, path.stem, url}
        if path.is_relative_to(base):
            names.add(str(path.relative_to(base)))
        return bool(names & self.archives)


def read_overrides(keys: Keys, pairs: Path | None, splits: Path | None, exclude: Path | None) -> Overrides:
    """Read the CSVs given.

    ``pairs`` has the columns thick, thin; ``splits`` patient, split; ``exclude`` any of archive, patient, study,
    series. Lines of ``splits`` and ``exclude`` may carry ``issuer`` beside a PatientID.

    Raises:
        InputError: A missing column, an unknown split, an empty cell, or a patient in two splits; names the line.
    """
    series = [
        (_key(row["thick"], keys.series(row["thick"])), _key(row["thin"], keys.series(row["thin"])))
        for _, row in _rows("--pairs", pairs, required=("thick", "thin"))
    ]
    assigned: dict[str, Split] = {}
    for line, row in _rows("--splits", splits, required=("patient", "split")):
        split = SPLITS.get(row["split"].casefold())
        patient = _key(row["patient"], keys.patient(row["patient"], row.get("issuer", "")))
        if split is None or assigned.get(patient, split) != split:
            raise InputError(
                f"line {line} of --splits "
                + ("has an unknown split" if split is None else "contradicts an earlier one"),
                expected="one of train, val, test, the same for all lines of a patient",
                remedy="Correct that line.",
            )
        assigned[patient] = split
    excluded: set[str] = set()
    archives: set[str] = set()
    for _, row in _rows("--exclude", exclude, any_of=("archive", "patient", "study", "series")):
        if row.get("archive"):
            archives.add(row["archive"])
        if row.get("patient"):
            excluded.add(_key(row["patient"], keys.patient(row["patient"], row.get("issuer", ""))))
        if row.get("study"):
            excluded.add(_key(row["study"], keys.study(row["study"])))
        if row.get("series"):
            excluded.add(_key(row["series"], keys.series(row["series"])))
    return Overrides(tuple(series), assigned, frozenset(excluded), frozenset(archives))


def _rows(
    option: str, path: Path | None, required: tuple[str, ...] = (), any_of: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Lines of a CSV as (number, stripped cells by lower-case column name)."""
    if path is None:
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table: list[dict[str | Any, Any]] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"the file of {option} cannot be read ({type(error).__name__})",
            expected="a CSV in UTF-8 with a header line",
            remedy="Check the path and the encoding.",
        ) from None
    for number, raw in enumerate(table, start=2):
        row = {str(k).strip().casefold(): str(v or "").strip() for k, v in raw.items() if k is not None}
        missing = [name for name in required if not row.get(name)]
        if missing or (any_of and not any(row.get(name) for name in any_of)):
            raise InputError(
                f"line {number} of {option} lacks {', '.join(missing) or 'every column'}",
                expected=f"the columns {', '.join(required) or ' or '.join(any_of)}, none empty",
                remedy="Add the header line or fill the cell.",
            )
        yield number, row


def _key(text: str, hashed: str) -> str:
    """A key as it is, anything else by its keyed hash."""
    is_key = len(text) == 16 and all(c in "0123456789abcdef" for c in text)
    return text if is_key else hashed
