"""From a scanned series to its public row and its private one. The public row holds nothing that identifies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from latentcache import SeriesRecord
from pipeline.identity import TELLING, Keys, PrivateStore, SeriesRow, identities_conflict, is_placeholder_id, one_of
from pipeline.reading import ScannedSeries, pointer_of
from pipeline.volume import RESAMPLED_FLAG

NO_PATIENT_ID = "no-patient-id"
SHARED_PATIENT_ID = "shared-patient-id"


class PatientKeys:
    """Gives every study its patient key, and keeps it: a study never changes patients between ingests."""

    def __init__(self, private: PrivateStore) -> None:
        self._private = private
        self._of_study: dict[str, tuple[str, tuple[str, ...]]] = {}
        self._identities: dict[str, list[Mapping[str, Any]]] = {}

    def learn(self, series: Iterable[ScannedSeries]) -> None:
        """Look up what PRIVATE knows of these studies and PatientIDs, in one pass."""
        keys = self._private.keys
        series = list(series)
        studies = {keys.study(one.study_uid) for one in series} - self._of_study.keys()
        patients = {keys.patient(one.patient_id, issuer_of(one)) for one in series} - self._identities.keys()
        known = one_of("study_key", studies) | one_of("patient_key", patients)
        rows = self._private.table("series", ["study_key", "patient_key", "issuer", "patient_id", "identity"], known)
        for row in rows.to_pylist():
            self._enter(row["study_key"], row["patient_key"], row["patient_id"], json.loads(row["identity"]))

    def of(self, one: ScannedSeries) -> tuple[str, tuple[str, ...]]:
        """Patient key and flags of a series."""
        keys = self._private.keys
        study = keys.study(one.study_uid)
        if study not in self._of_study:
            key = keys.patient(one.patient_id, issuer_of(one))
            others = self._identities.get(key, [])
            if is_placeholder_id(one.patient_id) or any(identities_conflict(one.header.identity, o) for o in others):
                key = keys.patient_of_study(one.study_uid)
            self._enter(study, key, one.patient_id, one.header.identity)
        return self._of_study[study]

    def _enter(self, study: str, patient: str, patient_id: str, identity: Mapping[str, Any]) -> None:
        flags: tuple[str, ...] = ()
        if is_placeholder_id(patient_id):
            flags = (NO_PATIENT_ID,)
        elif patient != self._private.keys.patient(patient_id, str(identity.get("IssuerOfPatientID") or "")):
            flags = (SHARED_PATIENT_ID,)
        self._of_study.setdefault(study, (patient, flags))
        told = {name: identity.get(name) for name in TELLING}
        kept = self._identities.setdefault(patient, [])
        if told not in kept:
            kept.append(told)


def issuer_of(one: ScannedSeries) -> str:
    """IssuerOfPatientID (0010,0021), empty where absent."""
    return str(one.header.identity.get("IssuerOfPatientID") or "")


def public_row(one: ScannedSeries, keys: Keys, patient: tuple[str, tuple[str, ...]], category: str) -> SeriesRecord:
    """The catalog's row of a scanned series, its split still open."""
    patient_key, patient_flags = patient
    geometry = one.geometry
    return SeriesRecord(
        series_key=keys.series(one.series_uid, one.discriminator),
        study_key=keys.study(one.study_uid),
        patient_key=patient_key,
        category=category,
        role=one.role_hint,
        status=one.status,
        reason=one.reason,
        n_slices=geometry.shape_zyx[0] if geometry else len(one.pointer_members),
        shape_zyx=geometry.shape_zyx if geometry else (0, 0, 0),
        spacing_mm_zyx=geometry.spacing_mm_zyx if geometry else (0.0, 0.0, 0.0),
        thickness_mm=geometry.thickness_mm if geometry else 0.0,
        affine_lps=tuple(v for row in geometry.affine_lps for v in row) if geometry else (),
        z_mm=geometry.z_mm if geometry else (),
        frame_key=keys.frame(one.frame_uid),
        acquisition_key=keys.acquisition(one.study_uid, one.acquisition),
        kernel=one.kernel or _unknown_kernel(one.kernel_text, keys),
        modality=one.modality,
        transfer_syntax=one.transfer_syntax,
        flags=(*one.flags, *patient_flags),
        source_digest=one.source_digest,
    )


def _unknown_kernel(text: str, keys: Keys) -> str:
    """A pseudonym for a kernel of unknown spelling: equal kernels stay equal, and free text stays private."""
    return f"#{keys.text(text.strip())[:8]}" if text.strip() else ""


def private_row(one: ScannedSeries, record: SeriesRecord) -> SeriesRow:
    """The row of PRIVATE for a scanned series."""
    return SeriesRow(
        pointer=replace(pointer_of(one, record.series_key), even=RESAMPLED_FLAG in one.flags),
        study_key=record.study_key,
        patient_key=record.patient_key,
        series_uid=one.series_uid,
        study_uid=one.study_uid,
        patient_id=one.patient_id,
        issuer=issuer_of(one),
        identity=one.header.identity,
    )


def with_reason(record: SeriesRecord, reason: str) -> SeriesRecord:
    """The row, quarantined."""
    return replace(record, status="quarantined", reason=reason)
