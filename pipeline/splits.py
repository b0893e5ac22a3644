"""Splits by patient: 75 / 15 / 10, stratified, and never changed for a patient that already has one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from latentcache.records import Split

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
        """Enter patients whose split stands."""
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
