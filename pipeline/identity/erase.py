"""Forget a patient: catalog, pairs, manifest, latents, snapshots, generated stores and PRIVATE, and keep them out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow.compute as pc

from latentcache import InputError, LatentStore
from latentcache.maintenance import Forgotten, forget_patient, keys_of_patient
from pipeline.identity.private_store import PrivateStore, one_of
from pipeline.identity.private_tables import archive_row, forgotten_archive


@dataclass(frozen=True)
class ForgetSummary:
    """Counts of what was, or would be, removed. ``private_rows`` counts rows of PRIVATE, old versions included."""

    patient_key: str
    dry_run: bool
    series: int = 0
    pairs: int = 0
    latents: int = 0
    generated_latents: int = 0
    private_rows: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """One line for people."""
        verb = "would forget" if self.dry_run else "forgot"
        return (
            f"{verb} patient {self.patient_key}: {self.series} series, {self.pairs} pairs, {self.latents} latents, "
            f"{self.generated_latents} generated latents, {self.private_rows} private rows"
        )


def forget(store: LatentStore, private: PrivateStore, patient_key: str, dry_run: bool = False) -> ForgetSummary:
    """Remove one patient everywhere. Repeating it is harmless and completes what was interrupted.

    The note that keeps the patient out comes first, the store next, and PRIVATE, which tells what belongs to the
    patient, last. Source archives, training runs and exported DICOM lie outside the store and are not touched.

    Raises:
        InputError: No such patient here.
    """
    in_store = keys_of_patient(store, patient_key)
    rows = private.table("series", ["series_key", "patient_key"]).filter(pc.field("patient_key") == patient_key)
    series_keys = in_store | set(rows["series_key"].to_pylist())
    if not series_keys and patient_key not in private.forgotten():
        raise InputError(
            "no such patient in this store",
            expected="a patient_key as the catalog lists it",
            remedy="`ctpipe whois STORE KEY` tells to which patient a series, study or pair belongs.",
        )
    if dry_run:
        return ForgetSummary(patient_key, True, *_counts(store, patient_key, in_store), private_rows=len(rows))
    private.remember_to_forget(patient_key)
    done: Forgotten = forget_patient(store, patient_key)
    removed = _forget_private(private, patient_key, series_keys)
    return ForgetSummary(
        patient_key, False, done.series, done.pairs, done.latents, done.generated_latents, private_rows=removed
    )


def _counts(store: LatentStore, patient_key: str, keys: set[str]) -> tuple[int, int, int]:
    """Series, pairs and latents of a patient in the current snapshot."""

    def own(table: Any) -> int:
        return int(pc.sum(pc.equal(table["patient_key"], patient_key)).as_py() or 0)

    latents = store.manifest_table(("key",)).filter(one_of("key", keys))
    return own(store.catalog_table(("patient_key",))), own(store.pairs_table(("patient_key",))), len(latents)


def _forget_private(private: PrivateStore, patient_key: str, series_keys: set[str]) -> int:
    """Remove a patient's rows from PRIVATE; archives that hold others too lose only this patient's series."""
    touched = []
    for row in map(archive_row, private.table("archives").to_pylist()):
        left = tuple(key for key in row.series_keys if key not in series_keys)
        if len(left) < len(row.series_keys):
            touched.append(replace(row, series_keys=left) if left else forgotten_archive(row))
    gone = {row.archive_key for row in touched if row.status == "forgotten"}
    # Every older version of these rows goes first: it names the archive.
    removed = private.rewrite_without("archives", one_of("archive_key", {row.archive_key for row in touched}))
    private.add_archives(touched)
    removed += private.rewrite_without(
        "quarantine", (pc.field("patient_key") == patient_key) | one_of("key", series_keys | gone | {patient_key})
    )
    removed += private.rewrite_without("series", pc.field("patient_key") == patient_key)
    return removed
