"""Count a store after an ingest, in Arrow: what there is, and what is excluded and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentcache import SIMULATED, LatentStore
from pipeline.ingest.batch import ARCHIVE_FLAG, SUPERSEDED_FLAG
from pipeline.ingest.overrides import EXCLUDED
from pipeline.ingest.plan import one_chunk
from pipeline.pairing import BETTER_MATCH, patient_table

SHOWN = 40
"""Lines of a list that people get; machines get all."""


@dataclass(frozen=True)
class SetAside:
    """Something that should have been usable and is not."""

    kind: str
    key: str
    reason: str


@dataclass(frozen=True)
class IngestSummary:
    """Counts over the whole store after an ingest, and what is excluded.

    ``archives`` counts by outcome of this run: new, changed, unchanged, ignored (folders without DICOM), excluded.
    """

    dry_run: bool = False
    archives: dict[str, int] = field(default_factory=dict)
    patients: int = 0
    studies: int = 0
    series: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    simulated_pairs: int = 0
    splits: dict[str, int] = field(default_factory=dict)
    paired_splits: dict[str, int] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    set_aside: Sequence[SetAside] = ()

    @property
    def quarantined(self) -> bool:
        """Whether the run ends with exit code 3."""
        return bool(self.set_aside)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "set_aside": [asdict(item) for item in self.set_aside]}

    def text(self) -> str:
        """A table for people."""

        def counts(values: dict[str, int]) -> str:
            return ", ".join(f"{n} {name}" for name, n in values.items()) or "none"

        simulated = f", {self.simulated_pairs} more simulated" if self.simulated_pairs else ""
        lines = [
            ("archives", counts(self.archives)),
            ("patients", f"{self.patients} ({counts(self.categories)})"),
            ("studies", str(self.studies)),
            ("series", counts(self.series)),
            ("pairs", str(self.pairs - self.simulated_pairs) + simulated),
            ("splits", f"{counts(self.splits)} patients; with a pair: {counts(self.paired_splits)}"),
            ("set aside", str(len(self.set_aside))),
        ]
        if self.dry_run:
            lines = [lines[0], ("dry run", "nothing was read or written")]
        width = max(len(name) for name, _ in lines)
        out = [f"{name:<{width}}  {value}" for name, value in lines]
        out += [f"  {item.kind} {item.key}: {item.reason}" for item in self.set_aside[:SHOWN]]
        if len(self.set_aside) > SHOWN:
            out.append(f"  and {len(self.set_aside) - SHOWN} more; --json lists all")
        return "\n".join(out)


COLUMNS = ("series_key", "study_key", "patient_key", "role", "status", "reason", "flags", "n_slices")


def summarise(store: LatentStore, archives: Mapping[str, int], more: Sequence[SetAside] = ()) -> IngestSummary:
    """The summary of a store; ``archives`` are this run's outcomes, ``more`` what else it excluded."""
    catalog = store.catalog_table(COLUMNS)
    catalog = catalog.filter(pc.invert(_flagged(catalog, SUPERSEDED_FLAG)))
    whole = _flagged(catalog, ARCHIVE_FLAG)
    series = catalog.filter(pc.invert(whole))
    usable = series.filter(pc.equal(series["status"], "ok"))
    patients = patient_table(store)
    pairs = store.pairs_table(("pair_key", "patient_key", "status", "reason", "evidence"))
    good = pairs.filter(pc.equal(pairs["status"], "ok"))
    roles = _counts(usable, "role")
    set_aside = pc.sum(pc.not_equal(series["status"], "ok")).as_py() or 0
    return IngestSummary(
        archives=dict(archives),
        patients=pc.count_distinct(series["patient_key"]).as_py(),
        studies=pc.count_distinct(series["study_key"]).as_py(),
        series={**roles, **({"set aside": set_aside} if set_aside else {})},
        pairs=len(good),
        simulated_pairs=pc.sum(pc.match_substring(good["evidence"], SIMULATED)).as_py() or 0,
        splits=_counts(patients, "split"),
        paired_splits=_counts(patients.filter(patients["paired"]), "split"),
        categories=_counts(patients, "category"),
        set_aside=[
            *_named("archive", catalog.filter(whole), "series_key"),
            *_named("series", series.filter(_undue(series)), "series_key"),
            *_unpaired(series, patients, pairs),
            *more,
        ],
    )


def _flagged(table: pa.Table, flag: str) -> pa.Array:
    """Whether each row carries a flag."""
    flags = one_chunk(table["flags"])
    hits = pc.list_parent_indices(flags).filter(pc.equal(pc.list_flatten(flags), flag))
    out = np.zeros(len(table), dtype=bool)
    out[np.asarray(hits)] = True
    return pa.array(out)


def _undue(series: pa.Table) -> pa.Array:
    """Series that should have been usable: quarantined, and not because the user asked for it."""
    return pc.and_(pc.not_equal(series["status"], "ok"), pc.not_equal(series["reason"], EXCLUDED))


def _named(kind: str, rows: pa.Table, key: str) -> list[SetAside]:
    columns = rows.select([key, "reason"]).sort_by(key).to_pydict()
    return [SetAside(kind, k, reason) for k, reason in zip(columns[key], columns["reason"], strict=True)]


def _unpaired(series: pa.Table, patients: pa.Table, pairs: pa.Table) -> list[SetAside]:
    """Patients without a pair, each with the reason of a usable series, or of the largest of what it has instead.

    A patient who appears among the quarantined series, or whom the user left out, is not named a second time.
    """
    paired = patients.filter(patients["paired"])["patient_key"].combine_chunks()
    rows = series.filter(pc.invert(pc.is_in(series["patient_key"], value_set=paired)))
    good = rows.filter(_usable(rows))
    named = pa.concat_arrays(
        [
            rows.filter(pc.not_equal(rows["status"], "ok"))["patient_key"].combine_chunks(),
            good["patient_key"].combine_chunks(),
        ]
    )
    nothing = rows.filter(pc.invert(pc.is_in(rows["patient_key"], value_set=named)))
    lone = good.group_by("patient_key").aggregate([("reason", "max")]).rename_columns(["patient_key", "reason"])
    largest = nothing.sort_by([("n_slices", "descending")]).group_by("patient_key", use_threads=False)
    useless = largest.aggregate([("reason", "first")]).rename_columns(["patient_key", "reason"])
    why = pc.binary_join_element_wise("no usable series", useless["reason"], ": ")
    useless = useless.set_column(1, "reason", why)
    # Series whose pair the pixels refused carry no reason of their own: the pair does.
    refused = pairs.filter(pc.and_(pc.not_equal(pairs["status"], "ok"), pc.not_equal(pairs["reason"], BETTER_MATCH)))
    by_pixels = dict(zip(refused["patient_key"].to_pylist(), refused["reason"].to_pylist(), strict=True))
    named_so_far = _named("patient", pa.concat_tables([lone, useless]), "patient_key")
    return [replace(item, reason=item.reason or by_pixels.get(item.key, "not paired")) for item in named_so_far]


def _usable(series: pa.Table) -> pa.Array:
    return pc.and_(pc.equal(series["status"], "ok"), pc.not_equal(series["role"], "other"))


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    rows = table.group_by(column).aggregate([([], "count_all")]).sort_by(column).to_pylist()
    return {str(row[column]) or "none": int(row["count_all"]) for row in rows}
