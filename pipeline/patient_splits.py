"""Which split a patient of the catalog is in: what stands is read once, what is new is assigned batch by batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc

from latentcache.records import PairRecord, SeriesRecord, Split
from latentcache.store import LatentStore
from pipeline.catalog_rows import pairs_where, series_where
from pipeline.discover import UNLABELLED
from pipeline.splits import SplitBook, SplitPatient


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
    """A row a patient with a usable series: patient_key, category, paired, split."""
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
