"""Interpolate the studies that are due: find the series that the rules select, have it made, record it once."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latentcache import InputError
from latentcache.storage import sync_folder
from pipeline.archive import Source, open_archive
from pipeline.engines import note
from pipeline.reading import ScannedSeries, parse_header, scan
from pipeline.serve.config import RuleConfig, ServeConfig
from pipeline.serve.contract import Interpolate, InterpolateRequest
from pipeline.serve.rules import SeriesFacts, select
from pipeline.serve.state import Claim, Folders, Made, Queue, remove_path
from pipeline.workflows import choose_thick

log = logging.getLogger("ctpipe.serve")


_DESCRIPTION = 0x0008103E
_HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class Selected:
    """The series to interpolate: its files, in a stable order, and a digest of what they hold."""

    rule: RuleConfig
    files: tuple[Path, ...]
    digest: str


class _Ended(Exception):  # noqa: N818 - a verdict, not an error
    """A study that gets no result: its state and why."""

    def __init__(self, state: str, reason: str) -> None:
        super().__init__(reason)
        self.state, self.reason = state, reason


class Worker:
    """Works on one study after another."""

    def __init__(self, config: ServeConfig, folders: Folders, queue: Queue, interpolate: Interpolate) -> None:
        self._config, self._folders, self._queue, self._interpolate = config, folders, queue, interpolate

    def step(self) -> bool:
        """Work on the next study that is due; return whether there was one.

        A study that raises InputError is at fault itself and is quarantined with the reason. Any other error is tried
        again, and so is work during which the process died; after some attempts the study is quarantined too.
        """
        timing = self._config.timing
        claim = self._queue.claim(timing.quiet_s, timing.unfinished_quiet_s)
        if claim is None:
            return False
        started = time.monotonic()
        if claim.attempt > timing.attempts:
            self._end(claim, "quarantined", f"the service ended {timing.attempts} times while it worked on this study")
            return True
        try:
            self._work(claim)
        except _Ended as verdict:
            self._end(claim, verdict.state, verdict.reason)
        except InputError as error:
            self._end(claim, "quarantined", error.found[:500])
        except Exception as error:  # noqa: BLE001 - one study must not stop the others; recorded and counted
            self._failed(claim, error)
        else:
            seconds = round(time.monotonic() - started, 3)
            note(log, "study_worked", study_key=claim.study_key, revision=claim.revision, seconds=seconds)
        return True

    def _failed(self, claim: Claim, error: Exception) -> None:
        timing, name = self._config.timing, type(error).__name__
        if claim.attempt >= timing.attempts:
            self._end(claim, "quarantined", f"{name} in each of {claim.attempt} attempts")
            return
        pause = min(timing.retry_most_s, timing.retry_s * 2.0 ** (claim.attempt - 1))
        self._queue.try_again(claim, pause, name)
        note(log, "study_failed", logging.WARNING, study_key=claim.study_key, attempt=claim.attempt, error=name)

    def _end(self, claim: Claim, state: str, reason: str) -> None:
        self._queue.end(claim, state, reason)
        level = logging.INFO if state == "skipped" else logging.ERROR
        note(log, f"study_{state}", level, f"{claim.study_key} {state}: {reason}", study_key=claim.study_key)

    def _work(self, claim: Claim) -> None:
        rows = self._queue.instances(claim.study_key)
        missing = sum(not row["kept"] for row in rows)
        if missing:
            raise _Ended(
                "held",
                f"it grew after {missing} of its {len(rows)} images had been deleted; send the whole study again",
            )
        senders = {row["sop_key"]: row["calling_ae"] for row in rows}
        digests = {row["sop_key"]: row["digest"] for row in rows}
        selected = self._select(claim.study_key, senders, digests)
        if selected.digest == self._queue.last_digest(claim.study_key):
            self._queue.unchanged(claim, selected.rule.name)
            return
        if claim.revision > self._config.timing.revisions:
            raise _Ended("held", f"it grew after {claim.revision - 1} results; a person decides")
        self._make(claim, selected)

    def _make(self, claim: Claim, selected: Selected) -> None:
        """Interpolate in a folder of this attempt, move the result into place and record it."""
        name = f"{claim.study_key}-{claim.revision}"
        work = self._folders.work / name
        remove_path(work)
        (work / "source").mkdir(mode=0o700, parents=True)
        for file in selected.files:
            os.link(file, work / "source" / file.name)
        started = time.monotonic()
        rule = selected.rule
        result = self._interpolate(
            InterpolateRequest(
                source=work / "source",
                out=work / "out",
                private=self._folders.state,
                model=rule.model or self._config.model,
                spacing_mm=rule.spacing_mm,
                restore_identity=rule.restore_identity,
                transfer_syntax=rule.transfer_syntax,
            )
        )
        seconds = round(time.monotonic() - started, 3)
        place = self._folders.result(claim.study_key, claim.revision)
        remove_path(place)  # of an attempt that was killed before it was recorded
        place.parent.mkdir(mode=0o700, exist_ok=True)
        os.rename(work / "out", place)
        sync_folder(place.parent)
        sync_folder(place.parent.parent)
        made = Made(selected.digest, tuple(result.folders), result.series_uid, result.n_slices, rule.name, seconds)
        self._queue.made(claim, made, rule.send_to)
        remove_path(work)

    def _select(self, study_key: str, senders: dict[str, str], digests: dict[str, str]) -> Selected:
        """Return the series that the rules select. Raises _Ended where there is none."""
        source = open_archive(self._folders.spool / study_key)
        try:
            names = {member.index: Path(member.name).stem for member in source.members()}
            found = scan(source).series
            facts = [_facts_of(source, series, names, senders) for series in found]
        finally:
            source.close()
        rule, numbers = select(self._config.rules, facts)
        if rule is None:
            raise _Ended("skipped", f"no rule selects any of its {len(found)} series")
        series = self._thick_of(rule, [found[number] for number in numbers])
        stems = sorted({names[member] for _, member, _ in series.pointer_members})
        digest = hashlib.sha256("\n".join([rule.name, *(digests[stem] for stem in stems)]).encode()).hexdigest()
        return Selected(rule, tuple(self._folders.image(study_key, stem) for stem in stems), digest)

    def _thick_of(self, rule: RuleConfig, selected: Sequence[ScannedSeries]) -> ScannedSeries:
        try:
            chosen = choose_thick(selected, spacing_mm=rule.spacing_mm)
        except InputError as error:
            broken = any(series.status != "ok" for series in selected)
            raise _Ended("quarantined" if broken else "skipped", error.found[:500]) from None
        assert isinstance(chosen, ScannedSeries)
        return chosen


def _facts_of(source: Source, series: ScannedSeries, names: dict[int, str], senders: dict[str, str]) -> SeriesFacts:
    members = {member for _, member, _ in series.pointer_members}
    public = series.header.public
    thickness = public.get("SliceThickness")
    return SeriesFacts(
        calling_ae=frozenset(senders[names[member]] for member in members if names[member] in senders),
        body_part=str(public.get("BodyPartExamined", "")),
        description=_description(source, min(members)) if members else "",
        thickness_mm=float(thickness) if thickness is not None else None,
        n_slices=len(series.pointer_members),
    )


def _description(source: Source, member: int) -> str:
    """Return SeriesDescription of an instance, empty where its header cannot be read in one go."""
    try:
        return parse_header(source.read(member, _HEAD_BYTES), whole=False).text(_DESCRIPTION)
    except InputError:
        return ""
