"""A user's decisions about rows that are in the catalog already: labels, exclusions, pairs, splits."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import pyarrow.compute as pc

from latentcache import LatentStore, PairRecord, SeriesRecord, Split, pairs_where, series_where
from latentcache.storage import local_path
from pipeline.identity import PrivateStore, archive_row, one_of
from pipeline.ingest.batch import no_complaint
from pipeline.ingest.overrides import EXCLUDED, Overrides
from pipeline.ingest.rows import with_reason
from pipeline.ingest.summary import SetAside
from pipeline.pairing import BETTER_MATCH, ON_REQUEST, PatientSplits, override_pair, pair_studies


def relabel(store: LatentStore, private: PrivateStore, categories: Mapping[str, str]) -> None:
    """Give the series of unchanged archives the category under which they now lie.

    Args:
        categories: New category by the archive's URL.
    """
    if not categories:
        return
    where = one_of("url", categories)
    archives = [archive_row(row) for row in private.table("archives", where=where).to_pylist()]
    label = {key: categories[row.url] for row in archives for key in row.series_keys}
    series = [replace(row, category=label[row.series_key]) for row in series_where(store, "series_key", label.keys())]
    pairs = [replace(pair, category=label[pair.thick_key]) for pair in pairs_where(store, "thick_key", label.keys())]
    store.append_catalog(series, pairs)
    private.add_archives([replace(row, category=categories[row.url]) for row in archives])


def retire_complaints(store: LatentStore, private: PrivateStore, dataset: str, gone: Collection[str]) -> None:
    """Take back what was reported of directory entries that are no longer there.

    Args:
        gone: Keys of entries that could not be used and were not found again; of other datasets they stay.
    """
    if not gone:
        return
    local = "://" not in dataset or dataset.startswith("file://")
    base = str(local_path(dataset).absolute()) if local else dataset.rstrip("/")

    def is_below(url: str) -> bool:
        place = str(local_path(url)) if local else url
        return place == base or place.startswith(f"{base}/")

    rows = [archive_row(row) for row in private.table("archives", where=one_of("archive_key", gone)).to_pylist()]
    rows = [row for row in rows if is_below(row.url)]
    if not rows:
        return
    store.append_catalog([no_complaint(row.archive_key, row.category) for row in rows], [])
    private.add_archives([replace(row, status="ok", reason="", digest="") for row in rows])


def pair_lone_thicks(store: LatentStore, private: PrivateStore, splits: PatientSplits) -> None:
    """Pair across fields of view what earlier runs left alone because no thin series has the same grid."""
    columns = store.catalog_table(("study_key", "role", "status", "reason"))
    lone = pc.and_(pc.equal(columns["role"], "thick"), pc.equal(columns["status"], "ok"))
    lone = pc.and_(lone, pc.match_substring(columns["reason"], ON_REQUEST))
    studies = set(columns["study_key"].filter(lone).to_pylist())
    rows = {row.series_key: row for row in series_where(store, "study_key", studies)}
    pairs = pair_studies(store, private.keys, rows, across_fields=True)
    if pairs:
        store.append_catalog(list(rows.values()), splits.apply(rows, pairs))


def apply_overrides(
    store: LatentStore, private: PrivateStore, splits: PatientSplits, overrides: Overrides, left_out: Collection[str]
) -> list[SetAside]:
    """Carry the user's CSVs over to rows that earlier runs or batches wrote; returns what could not be done.

    Args:
        left_out: URLs of archives that the user excludes.
    """
    _exclude(store, private, splits, overrides, left_out)
    refused = _pair(store, private, splits, overrides.pairs)
    _move(store, splits, overrides.splits)
    return refused


def _exclude(
    store: LatentStore, private: PrivateStore, splits: PatientSplits, overrides: Overrides, left_out: Collection[str]
) -> None:
    named = set(overrides.excluded)
    if left_out:
        rows = private.table("archives", ["url", "series_keys"], one_of("url", left_out))
        named |= {key for keys in rows["series_keys"].to_pylist() for key in keys}
    hit: dict[str, SeriesRecord] = {}
    for column in ("patient_key", "study_key", "series_key"):
        hit.update({row.series_key: row for row in series_where(store, column, named)})
    fresh = {key: with_reason(row, EXCLUDED) for key, row in hit.items() if row.status == "ok"}
    if fresh:
        pairs = pair_studies(store, private.keys, fresh)
        pairs = splits.apply(fresh, pairs)
        store.append_catalog(list(fresh.values()), pairs)


def _pair(
    store: LatentStore, private: PrivateStore, splits: PatientSplits, wanted: Sequence[tuple[str, str]]
) -> list[SetAside]:
    rows = {row.series_key: row for row in series_where(store, "series_key", {key for pair in wanted for key in pair})}
    standing = pairs_where(store, "thick_key", {thick for thick, _ in wanted})
    refused: list[SetAside] = []
    out: dict[str, PairRecord] = {}
    touched: dict[str, SeriesRecord] = {}
    for thick, thin in wanted:
        missing = [key for key in (thick, thin) if key not in rows or rows[key].status != "ok"]
        if missing:
            refused += [SetAside("series", key, "--pairs names it, but it is not usable here") for key in missing]
            continue
        pair = override_pair(rows[thick], rows[thin], private.keys)
        if any(old.pair_key == pair.pair_key and old.status == "ok" for old in standing):
            continue
        for old in standing:
            if old.thick_key == thick and old.status == "ok":
                out[old.pair_key] = replace(old, status="quarantined", reason=BETTER_MATCH)
        out[pair.pair_key] = pair
        touched.update({key: replace(rows[key], reason="") for key in (thick, thin)})
    if out:
        pairs = splits.apply(touched, list(out.values()))
        store.append_catalog(list(touched.values()), pairs)
    return refused


def _move(store: LatentStore, splits: PatientSplits, wanted: Mapping[str, Split]) -> None:
    series, pairs = splits.changed_by_user(wanted)
    if series or pairs:
        store.append_catalog(series, pairs)
