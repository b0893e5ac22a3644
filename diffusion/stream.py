"""Latents to batches: pairs of a store's split, shuffled, cropped, whitened and aligned by position, read ahead.

Shapes: B batch, C latent channels, D depth, H rows, W columns, all in latents; lower-case for one sample's own size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.alignment import align_depth
from diffusion.config import DataConfig
from diffusion.order import MicroBatch, draw_seed, plan_epoch, share_of_rank
from diffusion.pairs import PlannedLatent, PlannedPair, PlannedPairs, choose_encode_key, plan_pairs
from diffusion.prefetch import prefetch
from latentcache.errors import InputError, NonFiniteError
from latentcache.records import COMPRESSION, LATENT_CHANNELS, Split
from latentcache.store import LatentStore

Batch = dict[str, Any]
"""``thin condition`` (B, 4, D, H, W) float32, whitened; ``mask`` (B, 1, D, H, W) float32, 1 where a latent holds
scanned voxels;
``thick``: list of (4, d, H, W), the whitened latents that each condition was made of; ``z_mm`` (B, D) float64;
``study_key pair_key category``: lists of str; ``num_thin_slices num_thick_slices`` (B,) int64, of the whole series;
``weight`` (B,) float32, 0 for a filler; ``noise_seed``: list of int, the sample's own random stream in this epoch."""


@dataclass(frozen=True)
class Step:
    """One optimiser step as this rank sees it. ``batches`` must be used up before the next step is asked for."""

    epoch: int
    index: int
    steps_in_epoch: int
    samples: int
    n_batches: int
    batches: Iterator[Batch]


class PairStream:
    """The pairs of one split as an endless, resumable stream of steps.

    Args:
        store: Opened at the snapshot that the run is pinned to; later snapshots do not change the stream.
        data: Window or full volumes, batch size, alignment, readers.
        split: ``train`` or ``val``; ``all`` takes every pair.
        samples_per_step: Samples of one optimiser step over all ranks.
        seed: Orders, windows and noise follow from it.
        rank, world: This process among those that share each step.
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
        rank: int = 0,
        world: int = 1,
        in_plane_multiple: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.store, self.data, self.split = store, data, split
        self.samples_per_step, self.seed = samples_per_step, seed
        self.rank, self.world, self.pin_memory = rank, world, pin_memory
        self.multiple = in_plane_multiple
        self.encode_key = choose_encode_key(store, data.encode_key)
        mean, std = store.whitening(self.encode_key)
        self.mean, self.std = (np.asarray(m, np.float32)[:LATENT_CHANNELS] for m in (mean, std))
        self.pairs, self.left_out = plan_pairs(store, self.encode_key, data, split)
        self._shapes = self._sample_shapes(self.pairs)
        self._buckets = np.repeat(_numbered(self._shapes), data.windows_per_volume)
        self.epoch, self.index = 0, 0

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(plan_epoch(self._buckets, self.samples_per_step, self.seed, 0))

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
        reader = prefetch(self._tasks(epoch, index), self.data.readers, self.data.read_ahead)
        try:
            while True:
                plan = plan_epoch(self._buckets, self.samples_per_step, self.seed, epoch)
                for k in range(index, len(plan)):
                    chosen = plan.step(k)
                    n_batches = len(share_of_rank(chosen, self.data.batch_size, self.rank, self.world))
                    last = k + 1 == len(plan)
                    self.epoch, self.index = (epoch + 1, 0) if last else (epoch, k + 1)
                    yield Step(epoch, k, len(plan), len(chosen), n_batches, islice(reader, n_batches))
                epoch, index = epoch + 1, 0
        finally:
            reader.close()  # type: ignore[attr-defined]

    def _tasks(self, epoch: int, index: int) -> Iterator[partial[Batch]]:
        while True:
            plan = plan_epoch(self._buckets, self.samples_per_step, self.seed, epoch)
            for k in range(index, len(plan)):
                for micro in share_of_rank(plan.step(k), self.data.batch_size, self.rank, self.world):
                    yield partial(self.load, micro, epoch)
            epoch, index = epoch + 1, 0

    def fixed_batches(self, limit: int | None = None) -> Iterator[Batch]:
        """This rank's share of a pass in a fixed order with fixed windows and noise: the same at every validation."""
        plan = plan_epoch(self._buckets, self.data.batch_size * self.world, self.seed, 0, shuffle=False)
        micros = [
            m
            for k in range(len(plan))
            for m in share_of_rank(plan.step(k), self.data.batch_size, self.rank, self.world)
        ]
        tasks = (partial(self.load, micro, -1) for micro in micros[:limit])
        yield from prefetch(tasks, self.data.readers, self.data.read_ahead)

    def load(self, micro: MicroBatch, epoch: int) -> Batch:
        """Read the samples of a micro-batch and stack them."""
        samples = [self._sample(index, epoch) for index in micro.samples]
        batch: Batch = {
            name: torch.from_numpy(np.stack([s[name] for s in samples]))
            for name in ("thin", "condition", "mask", "z_mm")
        }
        batch["weight"] = torch.tensor(micro.weights, dtype=torch.float32)
        for name in ("num_thin_slices", "num_thick_slices"):
            batch[name] = torch.tensor([s[name] for s in samples])
        for name in ("study_key", "pair_key", "category", "noise_seed"):
            batch[name] = [s[name] for s in samples]
        batch["thick"] = [torch.from_numpy(s["thick"]) for s in samples]
        if self.pin_memory:
            batch = {name: v.pin_memory() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        return batch

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

    def _sample(self, index: int, epoch: int) -> dict[str, Any]:
        planned = self.pairs[index // self.data.windows_per_volume]
        depth, height, width = (int(n) for n in self._shapes[index // self.data.windows_per_volume])
        identity = (self.seed, epoch, planned.pair_key, index % self.data.windows_per_volume)
        rng = np.random.Generator(np.random.PCG64(draw_seed("window", *identity)))
        start = planned.first + int(rng.integers(planned.depth - depth + 1))
        y = int(rng.integers(planned.thin.shape[2] - height + 1))
        x = int(rng.integers(planned.thin.shape[3] - width + 1))
        plane = (slice(None), slice(None), slice(y, y + height), slice(x, x + width))
        thin = self._read(planned.thin, slice(start, start + depth))[plane]
        z_mm = np.asarray(planned.thin.z0_mm + planned.thin.dz_mm * np.arange(start, start + depth), np.float64)
        thick, condition = self._condition(planned, slice(start, start + depth), z_mm)
        return {
            "thin": thin,
            "thick": thick[plane],
            "condition": condition[plane],
            "mask": valid_mask(planned.thin.valid_zyx, depth, planned.thin.shape[2:])[plane],
            "z_mm": z_mm,
            "study_key": planned.study_key,
            "pair_key": planned.pair_key,
            "category": planned.category,
            "num_thin_slices": planned.thin.valid_zyx[0],
            "num_thick_slices": planned.num_thick_slices,
            "noise_seed": draw_seed("noise", *identity),
        }

    def _condition(
        self, planned: PlannedPair, window: slice, z_mm: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The latents that the condition is made of, and the condition on the thin window's positions."""
        if self.data.alignment == "pixel":
            same = self._read(planned.condition, window)
            return same, same
        record = planned.condition
        z_from = record.z0_mm + record.dz_mm * np.arange(record.shape[1])
        low = max(0, int(np.searchsorted(z_from, z_mm[0], side="right")) - 1)
        high = min(record.shape[1], int(np.searchsorted(z_from, z_mm[-1], side="left")) + 1)
        low, high = min(low, record.shape[1] - 1), max(high, 1)
        thick = self._read(record, slice(low, high))
        aligned = align_depth(torch.from_numpy(thick), z_from[low:high], z_mm)
        return thick, np.asarray(aligned, dtype=np.float32)

    def _read(self, record: PlannedLatent, depth: slice) -> NDArray[np.float32]:
        """A window of a latent, whitened; (4, d, h, w) float32."""
        # Where log-variances are stored too, they follow the means.
        latent = np.asarray(self.store.read(record, depth=depth)[:LATENT_CHANNELS], dtype=np.float32)
        latent -= self.mean[:, None, None, None]
        latent /= self.std[:, None, None, None]
        if not np.isfinite(latent).all():
            raise NonFiniteError(
                f"a {record.role} latent of series {record.key} holds NaN or infinity once whitened",
                expected="finite latents",
                remedy="Run `ctpipe verify STORE`, then encode the series again or exclude it.",
            )
        return latent


def _numbered(shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """(n,) a number for every row of (n, 3), equal where rows are equal, in the rows' order."""
    base = int(shapes.max(initial=0)) + 1
    return np.unique(shapes @ np.array([base * base, base, 1]), return_inverse=True)[1].reshape(-1)


def valid_mask(valid_zyx: tuple[int, int, int], depth: int, plane: tuple[int, int] | Any) -> NDArray[np.float32]:
    """(1, depth, h, w) float32: 1 where a latent covers at least one scanned voxel in-plane, 0 in the padding.

    Along depth every latent of a window lies inside the scan by construction.
    """
    mask = np.zeros((1, depth, *plane), dtype=np.float32)
    rows, columns = (-(-n // COMPRESSION) for n in valid_zyx[1:])
    mask[:, :, :rows, :columns] = 1.0
    return mask
