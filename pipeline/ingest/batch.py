"""One batch of scanned archives into the catalog: join, key, pair, split, commit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from latentcache import InputError, LatentStore, SeriesRecord, series_where
from pipeline.archive import UNLABELLED
from pipeline.identity import (
    UNUSABLE,
    ArchiveRow,
    Keys,
    PrivateStore,
    QuarantineRow,
    SeriesRow,
    archive_row,
    forgotten_archive,
    one_of,
)
from pipeline.ingest.overrides import EXCLUDED, Overrides
from pipeline.ingest.rows import PatientKeys, private_row, public_row, with_reason
from pipeline.ingest.scan import ArchiveScan, scan_joined
from pipeline.ingest.simulated import simulated_beside
from pipeline.pairing import PatientSplits, pair_studies
from pipeline.reading import ScannedSeries, as_requested

ARCHIVE_FLAG = "archive"
"""Flag of a catalog row of an archive excluded, whole or in part."""
SUPERSEDED_FLAG = "superseded"
"""Flag of a row that no longer means anything; nothing is counted or reported for it."""
SUPERSEDED = "no longer found in its archive"
NEVER_NS = -1
"""Modification time of no archive."""


class BatchWriter:
    """Writes batches of scans to a store whose lease the caller holds."""

    def __init__(
        self,
        store: LatentStore,
        private: PrivateStore,
        overrides: Overrides,
        splits: PatientSplits,
        pair_across_fov: bool = False,
        resample_variable_spacing: bool = False,
        simulate_thick_mm: float | None = None,
    ) -> None:
        self._store = store
        self._private = private
        self._keys = private.keys
        self._overrides = overrides
        self._patients = PatientKeys(private)
        self._forgotten = private.forgotten()
        self._splits = splits
        self._across_fov = pair_across_fov
        self._even = resample_variable_spacing
        self._simulate_thick_mm = simulate_thick_mm
        self.outcomes: Counter[str] = Counter()

    def commit(self, scans: Sequence[ArchiveScan]) -> None:
        """Catalogue one batch: PRIVATE first, then one snapshot, then the mark that the archives are done."""
        known = self._known_archives(scans)
        self._count(scans, known)
        owner = {scan.found.url: scan.found for scan in scans}
        found = [(as_requested(one) if self._even else one, url) for one, url in self._joined(scans)]
        if self._simulate_thick_mm is not None:
            found += simulated_beside(found, self._keys, self._simulate_thick_mm)
        self._patients.learn(one for one, _ in found)
        rows: dict[str, SeriesRecord] = {}
        sources: list[SeriesRow] = []
        for one, url in found:
            patient = self._patients.of(one)
            if patient[0] in self._forgotten:
                continue
            record = self._excluded(public_row(one, self._keys, patient, owner[url].category))
            rows[record.series_key] = record
            sources.append(private_row(one, record))
        rows.update(self._gone(scans, known, rows))
        pairs = pair_studies(self._store, self._keys, rows, self._across_fov)
        pairs = self._splits.apply(rows, pairs)
        whole = self._archive_rows(scans, known)
        self._private.add_sources(sources)
        self._private.quarantine([*_quarantine_rows(scans, self._keys), *_series_quarantine(rows)])
        self._store.append_catalog([*rows.values(), *whole], pairs)
        self._private.add_archives([self._archive_row(scan, sources, known) for scan in scans])

    # -- what the batch holds -------------------------------------------------------------------------------------

    def _known_archives(self, scans: Sequence[ArchiveScan]) -> dict[str, ArchiveRow]:
        urls = {self._keys.archive(scan.found.url): scan.found.url for scan in scans}
        rows = self._private.table("archives", where=one_of("archive_key", urls)).to_pylist()
        return {urls[row["archive_key"]]: archive_row(row) for row in rows}

    def _count(self, scans: Sequence[ArchiveScan], known: Mapping[str, ArchiveRow]) -> None:
        for scan in scans:
            if scan.empty_folder:
                self.outcomes["ignored"] += 1
            elif scan.found.refusal:
                self.outcomes["unusable"] += 1
            elif scan.unchanged:
                self.outcomes["unchanged"] += 1
            else:
                self.outcomes["changed" if scan.found.url in known else "new"] += 1

    def _joined(self, scans: Sequence[ArchiveScan]) -> list[tuple[ScannedSeries, str]]:
        """Series with an archive each; those spread over several archives are assembled from all of them."""
        holders: dict[str, set[str]] = defaultdict(set)
        for scan in scans:
            for one in scan.series:
                holders[one.series_uid].add(scan.found.url)
        where = one_of("series_uid", holders)
        for row in self._private.table("series", ["series_uid", "sources"], where).to_pylist():
            holders[row["series_uid"]].update(row["sources"])
        shared = {uid: tuple(sorted(urls)) for uid, urls in holders.items() if len(urls) > 1}
        whole: list[tuple[ScannedSeries, str]] = []
        lone = set(shared)
        groups: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for uid, urls in shared.items():
            groups[urls].add(uid)
        in_batch = {scan.found.url for scan in scans}
        for urls, uids in groups.items():
            try:
                parts = scan_joined(urls, uids)
            except InputError:
                continue  # another part has gone or broken: what this batch holds stands by itself
            first = next(url for url in urls if url in in_batch)
            whole += [(one, first) for one in parts]
            lone -= {one.series_uid for one in parts}
        single = [
            (one, scan.found.url)
            for scan in scans
            for one in scan.series
            if one.series_uid not in shared or one.series_uid in lone
        ]
        return single + whole

    def _excluded(self, record: SeriesRecord) -> SeriesRecord:
        named = {record.patient_key, record.study_key, record.series_key} & self._overrides.excluded
        return with_reason(record, EXCLUDED) if named else record

    def _gone(
        self, scans: Sequence[ArchiveScan], known: Mapping[str, ArchiveRow], rows: Mapping[str, SeriesRecord]
    ) -> dict[str, SeriesRecord]:
        """Rows of series that a changed archive no longer holds."""
        before = {key for scan in scans if not (scan.unchanged or scan.unreachable) and scan.found.url in known
                  for key in known[scan.found.url].series_keys}  # fmt: skip
        gone = series_where(self._store, "series_key", before - rows.keys())
        return {
            row.series_key: replace(with_reason(row, SUPERSEDED), flags=(*row.flags, SUPERSEDED_FLAG))
            for row in gone
            if SUPERSEDED_FLAG not in row.flags
        }

    # -- archives -------------------------------------------------------------------------------------------------

    def _archive_rows(self, scans: Sequence[ArchiveScan], known: Mapping[str, ArchiveRow]) -> list[SeriesRecord]:
        """Catalog rows for archives excluded, whole or in part, and the end of such a row once all can be read."""
        out = []
        for scan in scans:
            before = known.get(scan.found.url)
            if scan.complaint:
                out.append(_whole_archive(self._keys.archive(scan.found.url), scan.found.category, scan.complaint))
            elif before is not None and before.reason and not scan.unchanged:
                out.append(no_complaint(before.archive_key, scan.found.category))
        return out

    def _archive_row(
        self, scan: ArchiveScan, sources: Sequence[SeriesRow], known: Mapping[str, ArchiveRow]
    ) -> ArchiveRow:
        found = scan.found
        if scan.unchanged:
            row = known[found.url]
            return replace(row, mtime_ns=found.mtime_ns, etag=found.etag, size=found.size, category=found.category)
        held = {one.series_uid for one in scan.series}
        mine = tuple(source.pointer.series_key for source in sources if source.series_uid in held)
        before = known.get(found.url)
        if scan.ask_again or (scan.unreachable and not found.refusal):
            # No stamp of any archive: the next run reads it, whatever it looks like then.
            found = replace(found, mtime_ns=NEVER_NS, etag="")
        if scan.unreachable:
            if before is not None and before.status == "forgotten":
                return replace(before, size=found.size, mtime_ns=found.mtime_ns, etag=found.etag)
            mine = before.series_keys if before is not None else ()
        row = ArchiveRow(
            archive_key=self._keys.archive(found.url),
            url=found.url,
            size=found.size,
            mtime_ns=found.mtime_ns,
            etag=found.etag,
            digest="" if scan.ask_again else scan.digest,
            status=UNUSABLE if found.refusal else "quarantined" if scan.reason and not scan.empty_folder else "ok",
            reason=scan.complaint,
            category=found.category,
            series_keys=mine,
        )
        return forgotten_archive(row) if held and not mine else row


def no_complaint(archive_key: str, category: str) -> SeriesRecord:
    """The catalog row that takes back the report on an archive as a whole."""
    row = _whole_archive(archive_key, category, SUPERSEDED)
    return replace(row, flags=(*row.flags, SUPERSEDED_FLAG))


def _whole_archive(key: str, category: str, reason: str) -> SeriesRecord:
    return SeriesRecord(
        series_key=key,
        study_key="",
        patient_key="",
        category=category or UNLABELLED,
        role="other",
        status="quarantined",
        reason=reason,
        n_slices=0,
        shape_zyx=(0, 0, 0),
        spacing_mm_zyx=(0.0, 0.0, 0.0),
        thickness_mm=0.0,
        affine_lps=(),
        z_mm=(),
        frame_key="",
        acquisition_key="",
        kernel="",
        modality="",
        transfer_syntax="",
        flags=(ARCHIVE_FLAG,),
    )


def _quarantine_rows(scans: Sequence[ArchiveScan], keys: Keys) -> list[QuarantineRow]:
    """Archives and members excluded, in full, for PRIVATE."""
    out = []
    for scan in scans:
        key, url = keys.archive(scan.found.url), scan.found.url
        if scan.reason and not scan.empty_folder:
            out.append(QuarantineRow("archive", key, scan.reason, url=url, detail=scan.detail))
        out += [QuarantineRow("member", key, reason, url=url, member=name) for name, reason in scan.problems]
    return out


def _series_quarantine(rows: Mapping[str, SeriesRecord]) -> list[QuarantineRow]:
    return [
        QuarantineRow("series", key, row.reason, patient_key=row.patient_key)
        for key, row in rows.items()
        if row.status != "ok"
    ]
