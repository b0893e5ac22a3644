"""Splits of the catalog's patients: known ones are read once, new ones are assigned batch by batch."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from latentcache import LatentStore, PairRecord, SeriesRecord, Split, pairs_where, series_where
from pipeline.archive import UNLABELLED

FRACTIONS: dict[Split, float] = {"train": 0.75, "val": 0.15, "test": 0.10}
STARTERS: tuple[Split, ...] = ("train", "test", "val")
"""The first three patients of a stratified group go one to each split: an evaluation without a test patient is none."""


@dataclass(frozen=True)
class SplitPatient:
    """A patient to be assigned.

    ``category`` is a label of the allow-list. ``paired`` tells patients that can train or test from those with only
    a thick or a thin series: the fractions hold among the paired ones, whatever else the archive contains.
    """

    patient_key: str
    category: str
    paired: bool


class SplitBook:
    """Counts of patients by group, stratum and split; assigns new patients one after the other.

    Patients are taken in an order fixed by the seed and their keys alone (so the order of scanning does not matter)
    and each goes where the sum of two shortfalls is largest: that of its stratum and that of the whole group.
    So the fractions hold to within a patient or two overall and in every category, however patients arrive.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._groups: dict[bool, Counter[Split]] = {True: Counter(), False: Counter()}
        self._strata: dict[tuple[bool, str], Counter[Split]] = {}

    def count(self, category: str, paired: bool, split: Split, patients: int = 1) -> None:
        """Enter patients whose split is known."""
        if split:
            self._groups[paired][split] += patients
            self._strata.setdefault((paired, category), Counter())[split] += patients

    def assign(self, patients: Iterable[SplitPatient]) -> dict[str, Split]:
        """Splits for patients that have none yet; they are counted from then on."""
        new = {p.patient_key: p for p in patients}
        assigned: dict[str, Split] = {}
        for key in sorted(new, key=self._order):
            patient = new[key]
            group = self._groups[patient.paired]
            stratum = self._strata.get((patient.paired, patient.category), Counter())
            missing = [s for s in STARTERS if not group[s]]
            split = missing[0] if missing else _neediest(group, stratum)
            self.count(patient.category, patient.paired, split)
            assigned[key] = split
        return assigned

    def _order(self, patient_key: str) -> str:
        return hashlib.sha256(f"{self._seed}:{patient_key}".encode()).hexdigest()


def _shortfall(counts: Counter[Split], split: Split) -> float:
    """Patients that a split lacks once one more has been added."""
    return FRACTIONS[split] * (counts.total() + 1) - counts[split]


def _neediest(group: Counter[Split], stratum: Counter[Split]) -> Split:
    return max(FRACTIONS, key=lambda split: _shortfall(group, split) + _shortfall(stratum, split))


class PatientSplits:
    """Splits of a store's patients; the user's own assignments come before any other."""

    def __init__(self, store: LatentStore, by_user: Mapping[str, Split]) -> None:
        self._store = store
        self._by_user = by_user
        self._book = SplitBook(store.split_seed)
        patients = patient_table(store)
        self._of: dict[str, Split] = dict(
            zip(patients["patient_key"].to_pylist(), patients["split"].to_pylist(), strict=True)
        )
        counts = patients.group_by(["category", "paired", "split"]).aggregate([([], "count_all")]).to_pylist()
        for row in counts:
            self._book.count(row["category"], row["paired"], row["split"], row["count_all"])

    def apply(self, rows: dict[str, SeriesRecord], pairs: Sequence[PairRecord]) -> list[PairRecord]:
        """Assign splits to the patients of ``rows`` that have none, fill them in, and return the pairs with theirs."""
        categories: dict[str, set[str]] = defaultdict(set)
        for row in rows.values():
            if row.status == "ok" and row.role != "other":
                categories[row.patient_key].add(row.category)
        paired = {pair.patient_key for pair in pairs if pair.status == "ok"}
        new = []
        for patient, labels in categories.items():
            if self._of.get(patient):
                continue
            category = min(labels - {UNLABELLED}, default=UNLABELLED)
            if patient in self._by_user:
                self._of[patient] = self._by_user[patient]
                self._book.count(category, patient in paired, self._by_user[patient])
            else:
                new.append(SplitPatient(patient, category, patient in paired))
        self._of.update(self._book.assign(new))
        for key, row in rows.items():
            rows[key] = replace(row, split=self._of.get(row.patient_key, ""))
        return [replace(pair, split=self._of.get(pair.patient_key, "")) for pair in pairs]

    def changed_by_user(self, wanted: Mapping[str, Split]) -> tuple[list[SeriesRecord], list[PairRecord]]:
        """Rows of patients that stand in another split than the user now wants, moved."""
        moved = {patient for patient, split in wanted.items() if self._of.get(patient, split) != split}
        series = [
            replace(row, split=wanted[row.patient_key]) for row in series_where(self._store, "patient_key", moved)
        ]
        pairs = [
            replace(pair, split=wanted[pair.patient_key]) for pair in pairs_where(self._store, "patient_key", moved)
        ]
        self._of.update({patient: wanted[patient] for patient in moved})
        return series, pairs


def patient_table(store: LatentStore) -> pa.Table:
    """Return one row per patient with a usable series: patient_key, category, paired, split."""
    catalog = store.catalog_table(("patient_key", "category", "role", "status", "split"))
    usable = pc.and_(pc.equal(catalog["status"], "ok"), pc.not_equal(catalog["role"], "other"))
    catalog = catalog.filter(usable)
    # An unlabelled series beside a labelled one must not name the patient: it sorts behind every label.
    sortable = pc.if_else(pc.equal(catalog["category"], UNLABELLED), "\uffff", catalog["category"])
    by_patient = (
        catalog.set_column(catalog.schema.get_field_index("category"), "category", sortable)
        .group_by("patient_key")
        .aggregate([("category", "min"), ("split", "max")])
    )
    category = by_patient["category_min"]
    category = pc.if_else(pc.equal(category, "\uffff"), UNLABELLED, category)
    pairs = store.pairs_table(("patient_key", "status"))
    paired = pairs.filter(pc.equal(pairs["status"], "ok"))["patient_key"].unique()
    return pa.table(
        {
            "patient_key": by_patient["patient_key"],
            "category": category,
            "paired": pc.is_in(by_patient["patient_key"], value_set=paired),
            "split": by_patient["split_max"],
        }
    )
