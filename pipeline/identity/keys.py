"""Pseudonymous keys: the first 16 hex digits of HMAC-SHA256 over the archive's identifiers, under the store's secret.

Without the secret a key cannot be traced back by hashing a list of candidate PatientIDs (a plain SHA-256 could).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field

KEY_DIGITS = 16
MIN_SECRET_BYTES = 16


_STOCK_IDS = (
    "anon anonym anonymous anonymized anonymised anonymouspatient deidentified patient patientid id unknown unk none "
    "null nil na nan nopatientid noid notavailable removed deleted blank empty test default"
)
PLACEHOLDER_IDS = frozenset(_STOCK_IDS.split())
"""Normalised PatientIDs that de-identification tools and consoles write for everybody: they identify nobody."""


@dataclass(frozen=True)
class Keys:
    """Derives every key of a store from its secret.

    Each kind of identifier has a separate domain and every part is length-prefixed, so that no two different
    identifiers, of the same kind or not, can be confused by concatenation.
    """

    secret: bytes = field(repr=False)

    def _digest(self, kind: str, *parts: str) -> str:
        message = b"".join(len(raw).to_bytes(4, "big") + raw for raw in (p.encode() for p in (kind, *parts)))
        return hmac.new(self.secret, message, hashlib.sha256).hexdigest()[:KEY_DIGITS]

    @property
    def fingerprint(self) -> str:
        """Tells two secrets apart without revealing either; is in store.json."""
        return self._digest("fingerprint")

    def text(self, text: str) -> str:
        """Key of any other text."""
        return self._digest("text", text)

    def patient(self, patient_id: str, issuer: str = "") -> str:
        """Key of PatientID (0010,0020) within IssuerOfPatientID (0010,0021)."""
        return self._digest("patient", patient_id.strip(), issuer.strip())

    def patient_of_study(self, study_uid: str) -> str:
        """Patient key where the PatientID says nothing: every study counts as a separate patient."""
        return self._digest("patient-of-study", study_uid)

    def study(self, study_uid: str) -> str:
        """Key of StudyInstanceUID (0020,000D)."""
        return self._digest("study", study_uid)

    def series(self, series_uid: str, discriminator: str = "") -> str:
        """Key of SeriesInstanceUID (0020,000E), with a discriminator where one UID holds several volumes."""
        return self._digest("series", series_uid, discriminator)

    def frame(self, frame_uid: str) -> str:
        """Key of FrameOfReferenceUID (0020,0052); empty stays empty, since unknown is not equal to unknown."""
        return self._digest("frame", frame_uid) if frame_uid else ""

    def acquisition(self, study_uid: str, acquisition: str) -> str:
        """Key of an acquisition within a study; empty stays empty."""
        return self._digest("acquisition", study_uid, acquisition) if acquisition else ""

    def pair(self, thick_key: str, thin_key: str) -> str:
        """Key of a thick/thin pair."""
        return self._digest("pair", thick_key, thin_key)

    def archive(self, url: str) -> str:
        """Key of a source archive or folder: its name may hold a patient's."""
        return self._digest("archive", url)


TELLING = ("PatientBirthDate", "PatientSex")
"""Attributes that can tell that two studies under one PatientID are of two people."""


def is_placeholder_id(patient_id: str) -> bool:
    """Whether a PatientID identifies nobody: empty, nothing but zeros or crosses, or a tool's stock text."""
    normalised = "".join(c for c in patient_id.casefold() if c.isalnum())
    return set(normalised) <= {"0"} or set(normalised) <= {"x"} or normalised in PLACEHOLDER_IDS


def identities_conflict(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    """Whether two studies under one PatientID cannot be the same person: birth dates or sexes known and different.

    Names are not compared: their spelling varies, and cutting one person in two would leak between splits.
    """

    def known(identity: Mapping[str, object], keyword: str, allowed: frozenset[str] | None = None) -> str:
        value = str(identity.get(keyword) or "").strip().upper()
        return value if allowed is None or value in allowed else ""

    pairs = [
        (known(one, "PatientBirthDate"), known(other, "PatientBirthDate")),
        (known(one, "PatientSex", frozenset("MF")), known(other, "PatientSex", frozenset("MF"))),
    ]
    return any(a and b and a != b for a, b in pairs)
