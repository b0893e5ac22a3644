"""Pairs of the studies that a batch touches: new ones chosen, standing ones kept, lost ones ended."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from latentcache import LatentStore, PairRecord, SeriesRecord, pairs_where, series_where
from pipeline.identity import Keys
from pipeline.pairing.candidates import choose_pairs

BETTER_MATCH = "another pairing took its place"


def pair_studies(
    store: LatentStore, keys: Keys, rows: dict[str, SeriesRecord], across_fields: bool = False
) -> list[PairRecord]:
    """Pair rows to write for the studies of ``rows``, together with what the catalog holds of these studies.

    Adds to ``rows``, or replaces in it, every usable series that stays alone, with the reason. A study once paired
    across fields of view stays so when it is read again, whether or not that is asked for again.
    """
    touched = {row.study_key for row in rows.values()}
    standing = {row.series_key: row for row in series_where(store, "study_key", touched)}
    studies: dict[str, dict[str, SeriesRecord]] = defaultdict(dict)
    for row in (*standing.values(), *rows.values()):
        studies[row.study_key][row.series_key] = row
    old = {pair.pair_key: pair for pair in pairs_where(store, "study_key", touched)}
    out: list[PairRecord] = []
    for study in studies.values():
        here = [pair for pair in old.values() if pair.thick_key in study]
        across = across_fields or any(pair.across_fields and pair.status == "ok" for pair in here)
        chosen, alone = choose_pairs(study.values(), keys, across)
        out += _merged(chosen, here, study, standing)
        for key, row in study.items():
            reason = f"not paired: {alone[key]}" if key in alone else ""
            if row.status == "ok" and row.role != "other" and row.reason != reason:
                rows[key] = replace(row, reason=reason)
    return out


def _merged(
    chosen: Sequence[PairRecord],
    old: Sequence[PairRecord],
    study: Mapping[str, SeriesRecord],
    before: Mapping[str, SeriesRecord],
) -> list[PairRecord]:
    """New pairs, less those that stand already; and the old rows that no longer stand, quarantined."""

    def same(key: str) -> bool:
        return key in before and key in study and before[key].source_digest == study[key].source_digest

    by_user = {p.thick_key for p in old if p.status == "ok" and json.loads(p.evidence).get("chosen_by") == "user"}
    dead = {key for key, row in study.items() if row.status != "ok"}
    chosen = [pair for pair in chosen if pair.thick_key not in by_user]
    standing = {p.pair_key for p in old if same(p.thick_key) and same(p.thin_key) and p.reason != BETTER_MATCH}
    wanted = {pair.pair_key for pair in chosen}
    out = [pair for pair in chosen if pair.pair_key not in standing]
    for pair in old:
        lost = pair.thick_key in dead or pair.thin_key in dead
        replaced = pair.pair_key not in wanted and pair.thick_key not in by_user
        if pair.status == "ok" and (lost or replaced):
            out.append(replace(pair, status="quarantined", reason=BETTER_MATCH))
    return out
