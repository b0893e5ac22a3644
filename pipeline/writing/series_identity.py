"""Identity of a derived series: pseudonymous UIDs made from keys, or the originals for use inside the hospital."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from latentcache import InputError
from pipeline.volume import SourceHeader

_UUID_VERSION_8 = 8 << 76
_UUID_VERSION_MASK = 0xF << 76
_UUID_VARIANT = 0b10 << 62
_UUID_VARIANT_MASK = 0b11 << 62


_RESTORED_KEYWORDS = (
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "StudyDescription",
    "AccessionNumber",
    "ReferringPhysicianName",
)
_REQUIRED_FOR_RESTORE = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")


def derived_uid(*parts: str) -> str:
    """A UID under ``2.25`` from text, always the same for the same parts (DICOM PS3.5 B.2).

    The 128 bits are the first of SHA-256 over the length-prefixed parts, marked as a custom (version 8) UUID.
    """
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode()
        digest.update(len(raw).to_bytes(4, "little"))
        digest.update(raw)
    number = int.from_bytes(digest.digest()[:16], "big")
    number = (number & ~_UUID_VERSION_MASK & ~_UUID_VARIANT_MASK) | _UUID_VERSION_8 | _UUID_VARIANT
    return f"2.25.{number}"


@dataclass(frozen=True)
class SeriesIdentity:
    """Everything in a derived series that says whose it is and what it was made from.

    Attributes:
        patient: DICOM keyword to value for the patient and study modules.
        study_uid: StudyInstanceUID of source and derived series alike.
        frame_uid: FrameOfReferenceUID of source and derived series alike.
        source_sop_uids: Every source slice that contributed, in slice order, without repeats.
        restored: True where these are the patient's own values and not keys.
    """

    patient: Mapping[str, str]
    study_uid: str
    frame_uid: str
    source_sop_uids: tuple[str, ...] = ()
    source_sop_class: str = "1.2.840.10008.5.1.4.1.1.2"
    restored: bool = field(default=False)

    @classmethod
    def pseudonymous(
        cls,
        *,
        patient_key: str,
        study_key: str,
        frame_key: str,
        source_key: str,
        source_slices: int,
        source_sop_class: str = "1.2.840.10008.5.1.4.1.1.2",
    ) -> SeriesIdentity:
        """Identity from keys alone; nothing of the patient is read, so nothing can leak.

        Two series of one study get one StudyInstanceUID, and a series always the same SOPInstanceUIDs.
        """
        return cls(
            patient={"PatientID": patient_key, "PatientName": patient_key},
            study_uid=derived_uid("study", study_key),
            frame_uid=derived_uid("frame", frame_key),
            source_sop_uids=tuple(derived_uid("instance", source_key, str(i)) for i in range(source_slices)),
            source_sop_class=source_sop_class,
        )

    @classmethod
    def original(cls, source: SourceHeader, *, source_sop_class: str = "1.2.840.10008.5.1.4.1.1.2") -> SeriesIdentity:
        """The patient's own identity and UIDs, for ``--restore-identity``.

        Raises:
            InputError: The private record lacks what a study needs; names the missing attributes, never values.
        """
        missing = [k for k in _REQUIRED_FOR_RESTORE if k not in source.identity]
        if missing or not source.sop_instance_uids:
            raise InputError(
                f"no private record of {', '.join(missing) or 'SOPInstanceUID'}",
                expected="the identity of the source series in the private store",
                remedy="Leave --restore-identity away, or ingest the archive again with its private store at hand.",
            )
        return cls(
            patient={
                k: str(source.identity[k]) for k in _RESTORED_KEYWORDS if source.identity.get(k) not in (None, "")
            },
            study_uid=str(source.identity["StudyInstanceUID"]),
            frame_uid=str(source.identity["FrameOfReferenceUID"]),
            source_sop_uids=tuple(dict.fromkeys(source.sop_instance_uids)),
            source_sop_class=source_sop_class,
            restored=True,
        )
