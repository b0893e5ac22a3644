"""Identity behind a key: answered from PRIVATE, and every question is written down there before it is answered."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.compute as pc

from latentcache import InputError, LatentStore
from pipeline.identity.private_store import PrivateStore, one_of


@dataclass(frozen=True)
class Identity:
    """Identity of one series in PRIVATE: original identifiers and the archives that hold it."""

    series_key: str
    study_key: str
    patient_key: str
    patient_id: str
    issuer: str
    study_uid: str
    series_uid: str
    identity: dict[str, Any]
    archives: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """``kind`` is patient, study, series, pair or archive. ``set_aside`` are rows of the quarantine, in full."""

    key: str
    kind: str
    series: tuple[Identity, ...]
    archives: tuple[str, ...]
    set_aside: tuple[dict[str, Any], ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """Lines for people; the only output of ctpipe that names a patient."""
        lines = [f"{self.kind} {self.key}"]
        for one in self.series:
            named = ", ".join(f"{k} {v}" for k, v in one.identity.items() if v and k in _SHOWN)
            lines.append(f"  series {one.series_key}: PatientID {one.patient_id or '(empty)'}, {named}")
            lines.append(f"    study {one.study_uid}, series {one.series_uid}")
            lines += [f"    in {url}" for url in one.archives]
        lines += [f"  archive {url}" for url in self.archives]
        lines += [f"  set aside: {r['member'] or r['url'] or r['key']}: {r['reason']}" for r in self.set_aside]
        return "\n".join(lines)


_SHOWN = ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "AccessionNumber")
_KINDS = ("patient", "study", "series")


def whois(private: PrivateStore, key: str, store: LatentStore | None = None) -> Answer:
    """Answer who a patient, study, series, pair or archive key is.

    Args:
        store: Needed for pair keys only.

    Raises:
        InputError: Nothing in this store has this key; the question is written down all the same.
    """
    columns = [*(f"{kind}_key" for kind in _KINDS), "patient_id", "issuer", "study_uid", "series_uid", "identity"]
    series_keys = _pair_members(store, key)
    rows: list[dict[str, Any]] = []
    found = "pair" if series_keys else ""
    for kind in _KINDS:
        if rows:
            break
        where = one_of("series_key", series_keys) if series_keys else pc.field(f"{kind}_key") == key
        rows = private.table("series", [*columns, "sources"], where).to_pylist()
        found = found or (kind if rows else "")
    archives = private.table("archives", ["archive_key", "url"], pc.field("archive_key") == key)["url"].to_pylist()
    found = found or ("archive" if archives else "")
    set_aside = private.table("quarantine", where=one_of("key", {key, *series_keys})).to_pylist()
    private.log_whois(key, bool(found))
    if not found:
        raise InputError(
            f"no patient, study, series, pair or archive of this store has the key {key}",
            expected="a key of this store, as `ctpipe status` and the logs name them",
            remedy="Check the key, and that --private is the private part of this very store.",
        )
    return Answer(
        key=key,
        kind=found,
        series=tuple(
            Identity(
                **{name: row[name] for name in columns if name != "identity"},
                identity=json.loads(row["identity"]),
                archives=tuple(row["sources"]),
            )
            for row in rows
        ),
        archives=tuple(url for url in archives if url),
        set_aside=tuple(set_aside),
    )


def _pair_members(store: LatentStore | None, key: str) -> set[str]:
    if store is None:
        return set()
    pairs = store.pairs_table(("pair_key", "thick_key", "thin_key")).filter(pc.field("pair_key") == key).to_pylist()
    return {series for pair in pairs for series in (pair["thick_key"], pair["thin_key"])}
