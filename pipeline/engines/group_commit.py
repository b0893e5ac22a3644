"""Group commit: a separate thread makes new latents visible, as many at once as came in since the last commit.

Nothing waits for a batch to fill: what is there is committed as soon as the last commit is done and ``INTERVAL_S`` have
passed since it began. So a kill loses what is in hand and at most half a second of what was done, an archive of a
million series makes ten thousand snapshots and not a million, and the store's latency stays out of the engine's loop.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from latentcache import LatentRecord, PairRecord, Writer
from pipeline.engines.contract import Outcome
from pipeline.engines.job_log import note


@dataclass(frozen=True)
class StagedLatents:
    """Latents for the committing driver. ``pair`` is the pair's row with the pixel proof, if it was due.

    ``seconds`` splits the device part: ``proof``, ``window`` (with interpolation), ``vae``, ``round_trip``, ``store``.
    """

    name: str
    records: tuple[LatentRecord, ...]
    pair: PairRecord | None = None
    seconds: dict[str, float] = field(default_factory=dict)


log = logging.getLogger("ctpipe.encode")


INTERVAL_S = 0.5
MOST_AT_ONCE = 4096


Done = Outcome[Any, StagedLatents]
"""Outcome of a task; its ``name`` is the key of its row in the timings."""


class GroupCommit:
    """Context manager around a writer: ``put`` outcomes from the driver; leaving commits what is left.

    Attributes:
        committed: Latents committed so far; final once the context is left.
        stage: What the tasks are, for their rows in the timings.
    """

    def __init__(
        self, writer: Writer, encode_key: str, device: str, note: Callable[[int, int], None], stage: str = "encode"
    ) -> None:
        self.writer, self.encode_key, self.device, self.stage = writer, encode_key, device, stage
        self.committed = 0
        self._note = note
        self._waiting: queue.Queue[Done | None] = queue.Queue(maxsize=2 * MOST_AT_ONCE)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._drain, name="ctpipe-commit", daemon=True)

    def __enter__(self) -> GroupCommit:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waiting.put(None)
        self._thread.join()
        if error is None:
            self._check()

    def put(self, outcome: Done) -> None:
        """Hand over what became of one task; blocks while the store cannot keep up.

        Raises:
            StoreError: An earlier commit failed: the lease is lost, or bytes are missing.
        """
        self._check()
        self._waiting.put(outcome)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _drain(self) -> None:
        last, finished, attempted = 0.0, False, 0
        while not finished:
            batch: list[Done] = []
            first = self._waiting.get()
            # The end is never kept waiting; a batch is, until the interval since the last commit has passed.
            if first is not None:
                batch.append(first)
            finished = first is None
            while not finished and len(batch) < MOST_AT_ONCE:
                try:
                    following = self._waiting.get(timeout=max(0.0, last + INTERVAL_S - time.monotonic()))
                except queue.Empty:
                    break
                if following is None:
                    finished = True
                else:
                    batch.append(following)
            last = time.monotonic()
            if batch and self._failure is None:
                try:
                    self._commit(batch)
                except BaseException as error:  # noqa: BLE001 - raised again by put and at the end
                    self._failure = error
                attempted += len(batch)
                self._note(attempted, self.committed)

    def _commit(self, batch: Sequence[Done]) -> None:
        """Pair proofs, then latents: a crash between the two leaves work to do again, never a false row."""
        pairs: list[PairRecord] = []
        records: list[LatentRecord] = []
        for outcome in batch:
            if outcome.value is not None:
                records.extend(outcome.value.records)
                if outcome.value.pair is not None:
                    pairs.append(outcome.value.pair)
        if pairs:
            self.writer.append_catalog([], pairs)
        began = time.monotonic()
        latents = len(self.writer.commit(records, timings=[self._timing(outcome) for outcome in batch]))
        self.committed += latents
        took = round(time.monotonic() - began, 6)
        note(log, "commit", stage="commit", series=len(batch), latents=latents, seconds=took)

    def _timing(self, outcome: Done) -> dict[str, Any]:
        """The row of the timings table: what an attempt at one task cost, by stage, in seconds."""
        parts = outcome.value.seconds if outcome.value is not None else {}
        records = outcome.value.records if outcome.value is not None else ()
        return {
            "key": outcome.item.name,
            "encode_key": self.encode_key,
            "stage": self.stage,
            "outcome": outcome.error_kind or "ok",
            "device": self.device,
            "attempts": outcome.attempts,
            "latents": len(records),
            "voxels": sum(math.prod(record.valid_zyx) for record in records),
            "latent_bytes": sum(2 * math.prod(record.shape) for record in records),
            **outcome.seconds,
            **parts,
        }
