"""Latents to batches: pairs of a store's split, shuffled, cropped, whitened and aligned by position, read ahead.

Shapes: B batch, C latent channels, D depth, H rows, W columns, all in latents; lower-case for one sample's own size.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffusion.config import DataConfig
from diffusion.data.batches import Batch, BatchReader, Mirrored
from diffusion.data.epoch_plan import EpochPlan, MicroBatch, plan_epoch, share_of_rank, steps_in_epoch
from diffusion.data.pairs import PlannedPairs, Tables, choose_encode_key, mirrored_keys, only_refiner, plan_pairs
from diffusion.data.prefetch import prefetch
from latentcache import COMPRESSION, LATENT_CHANNELS, InputError, LatentStore, Split


@dataclass(frozen=True)
class Step:
    """One optimiser step as this rank sees it. ``batches`` must be used up before the next step is asked for."""

    epoch: int
    index: int
    steps_in_epoch: int
    samples: int
    n_batches: int
    batches: Iterator[Batch]


@dataclass(frozen=True)
class ProcessShare:
    """Process ``rank`` of ``world`` that share each step; ``pin_memory`` where it copies batches to a GPU."""

    rank: int = 0
    world: int = 1
    pin_memory: bool = False


class PairStream:
    """The pairs of one split as an endless, resumable stream of steps.

    Args:
        store: Opened at the snapshot that the run is pinned to; later snapshots do not change the stream.
        data: Window or full volumes, batch size, alignment, readers.
        split: ``train`` or ``val``; ``all`` takes every pair.
        samples_per_step: Samples of one optimiser step over all ranks.
        seed: Orders, windows and noise follow from it.
        share: This process among those that share each step.
        told: Batches have the acquisition facts (``told``), for models that take them.
        in_plane_multiple: Height and width of every sample are multiples of this (a U-Net's in-plane step).

    Raises:
        InputError: No usable pair, several encode keys, latents of another channel count.
    """

    def __init__(
        self,
        store: LatentStore,
        data: DataConfig,
        *,
        split: Split | Literal["all"] = "train",
        samples_per_step: int = 1,
        seed: int = 0,
        share: ProcessShare = ProcessShare(),
        in_plane_multiple: int = 1,
        told: bool = False,
    ) -> None:
        self.store, self.data, self.split = store, data, split
        self.samples_per_step, self.seed = samples_per_step, seed
        self.rank, self.world = share.rank, share.world
        self.multiple = in_plane_multiple
        self.encode_key = choose_encode_key(store, data.encode_key)
        tables = Tables.read(store, self.encode_key, data, told)
        moments = tables.moments()
        self.mean, self.std = (np.asarray(m, np.float32)[:LATENT_CHANNELS] for m in (moments.mean, moments.std))
        self.pairs, self.left_out = plan_pairs(store, self.encode_key, data, split, tables)
        self._shapes = self._sample_shapes(self.pairs)
        self._buckets = np.repeat(_numbered(self._shapes), data.windows_per_volume)
        self._batches = BatchReader(
            store, self.pairs, self._shapes, data, mean=self.mean, std=self.std, seed=seed, pin_memory=share.pin_memory
        )
        if split == "train":
            self._batches.mirrored = self._mirrored(data, told)
        self._plans = _Plans(partial(plan_epoch, self._buckets, samples_per_step, seed))
        self.epoch, self.index = 0, 0

    def __len__(self) -> int:
        """Steps in an epoch."""
        return steps_in_epoch(self._buckets, self.samples_per_step)

    @property
    def samples_per_epoch(self) -> int:
        return len(self._buckets)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Distinct (D, H, W) of the batches, largest first."""
        distinct = {(int(d), int(h), int(w)) for d, h, w in np.unique(self._shapes, axis=0)}
        return sorted(distinct, key=lambda s: (-math.prod(s), s))

    @property
    def thin_spacing_mm(self) -> float:
        """Median distance between thin slices of the pairs, mm; a latent slice covers COMPRESSION of them."""
        return float(np.median(self.pairs.thin.column("dz_mm"))) / COMPRESSION

    def state_dict(self) -> dict[str, int]:
        """The position after the step last handed out: what was read ahead is read again after a resume."""
        return {"epoch": self.epoch, "index": self.index, "samples_per_epoch": self.samples_per_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where another stream of the same store, split and seed stood.

        Raises:
            InputError: The split holds another number of samples than it did.
        """
        if state["samples_per_epoch"] != self.samples_per_epoch:
            raise InputError(
                f"{self.samples_per_epoch} samples an epoch where the checkpoint saw {state['samples_per_epoch']}",
                expected="the store snapshot, splits and data settings that the run began with",
                remedy="Restore the store, or start a new run directory.",
            )
        self.epoch, self.index = state["epoch"], state["index"]

    def __iter__(self) -> Iterator[Step]:
        """Steps from the current position on, without end."""
        epoch, index = self.epoch, self.index
        reader = self._prefetch(self._tasks(epoch, index))
        try:
            while True:
                plan = self._plans.of(epoch)
                for k in range(index, len(plan)):
                    chosen = plan.step(k)
                    n_batches = len(share_of_rank(chosen, self.data.batch_size, self.rank, self.world))
                    last = k + 1 == len(plan)
                    self.epoch, self.index = (epoch + 1, 0) if last else (epoch, k + 1)
                    yield Step(epoch, k, len(plan), len(chosen), n_batches, islice(reader, n_batches))
                epoch, index = epoch + 1, 0
        finally:
            reader.close()  # type: ignore[attr-defined]

    def _tasks(self, epoch: int, index: int) -> Iterator[_Load]:
        """Yield what the readers load: an epoch is planned by the reader that comes to it first."""
        while True:
            plan = self._plans.of(epoch)
            for k in range(index, len(plan)):
                for micro in share_of_rank(plan.step(k), self.data.batch_size, self.rank, self.world):
                    yield _Load(self._batches, micro, epoch)
            epoch, index = epoch + 1, 0

    def _prefetch(self, tasks: Iterator[_Load]) -> Iterator[Batch]:
        return prefetch(tasks, self.data.readers, self.data.read_ahead, size=_Load.size)

    def fixed_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """This rank's share of a pass in a fixed order with fixed windows and noise: the same at every validation."""
        plan = plan_epoch(self._buckets, self.data.batch_size * self.world, self.seed, 0, shuffle=False)
        micros = [
            m
            for k in range(len(plan))
            for m in share_of_rank(plan.step(k), self.data.batch_size, self.rank, self.world)
        ]
        yield from self._prefetch(_Load(self._batches, micro, -1) for micro in micros[:limit])

    def _mirrored(self, data: DataConfig, told: bool) -> list[Mirrored]:
        """The training pairs that are cached mirrored too; pairs that are not are drawn as they are, and counted."""
        found = []
        for name, encode_key in mirrored_keys(self.store, self.encode_key, data.augment).items():
            tables = Tables.read(self.store, encode_key, data, told)
            pairs, _ = plan_pairs(self.store, encode_key, data, "train", tables)
            if len(pairs) and (made := only_refiner(pairs)) != (own := only_refiner(self.pairs)):
                raise InputError(
                    f"{name} latents of refiner {made[:12]} beside latents of refiner {own[:12]}",
                    expected="one refiner: a model cannot start from the slices of two",
                    remedy=f"Run `ctpipe encode STORE --refiner RUN --augment {name} --refresh`.",
                )
            mirrored = Mirrored.of(pairs, self.pairs)
            if missing := int((mirrored.at < 0).sum()):
                self.left_out[f"no {name} latents (only as they are; `ctpipe encode STORE --augment {name}`)"] = missing
            found.append(mirrored)
        return found

    def _sample_shapes(self, pairs: PlannedPairs) -> NDArray[np.int64]:
        """(n, 3) depth, height and width of every pair's samples: window or bucketed depth, crop or the whole plane."""
        if self.data.window is not None:
            depth = np.minimum(self.data.window, pairs.depth)
        else:
            bucketed = pairs.depth // self.data.depth_bucket * self.data.depth_bucket
            depth = np.where(bucketed > 0, bucketed, pairs.depth)
        plane = pairs.thin.shape[:, 2:]
        plane = np.minimum(self.data.crop, plane) if self.data.crop else plane
        plane = plane // self.multiple * self.multiple
        for row in np.flatnonzero((plane == 0).any(axis=1))[:1]:
            shape = pairs[int(row)].thin.shape
            raise InputError(
                f"a latent plane of {shape[2]} x {shape[3]} (series {pairs[int(row)].thin.key})",
                expected=f"at least {self.multiple} x {self.multiple}, the U-Net's in-plane step",
                remedy="Use a model with fewer levels or latent patch 1, or exclude the series.",
            )
        return np.column_stack([depth, plane])


@dataclass(frozen=True)
class _Load:
    """A batch to be read."""

    reader: BatchReader
    micro: MicroBatch
    epoch: int

    def __call__(self) -> Batch:
        return self.reader.load(self.micro, self.epoch)

    def size(self) -> int:
        return self.reader.size(self.micro)


class _Plans:
    """Plans of the epochs that are being read and trained on; made once each, by whichever thread asks first."""

    def __init__(self, make: Callable[[int], EpochPlan]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._made: dict[int, EpochPlan] = {}

    def of(self, epoch: int) -> EpochPlan:
        with self._lock:
            if epoch not in self._made:
                self._made = {e: plan for e, plan in self._made.items() if e == epoch - 1} | {epoch: self._make(epoch)}
            return self._made[epoch]


def _numbered(shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) a number for every row of (n, 3), equal where rows are equal, in the rows' order."""
    base = int(shapes.max(initial=0)) + 1
    return np.unique(shapes @ np.array([base * base, base, 1]), return_inverse=True)[1].reshape(-1)
