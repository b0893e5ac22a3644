"""Division of samples into steps: a seeded order over the whole store that depends on neither ranks nor reader threads.

A step is a fixed list of samples of one shape, whatever the number of processes; each rank computes its share of that
list. So two GPUs take the steps that one would, and a run may be resumed on another number of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EpochPlan:
    """The steps of one epoch over ``n`` samples.

    Attributes:
        samples: (n,) int64; every sample once, those of a step side by side.
        bounds: (steps + 1,) int64; step k holds ``samples[bounds[k]:bounds[k + 1]]``.
    """

    samples: NDArray[np.int64]
    bounds: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def step(self, index: int) -> NDArray[np.int64]:
        return self.samples[self.bounds[index] : self.bounds[index + 1]]


def plan_epoch(buckets: NDArray[Any], samples_per_step: int, seed: int, epoch: int, shuffle: bool = True) -> EpochPlan:
    """Cut an epoch into steps of at most ``samples_per_step`` samples of one bucket.

    Samples are shuffled, gathered by bucket (so that every batch has one shape and ranks have equal work), cut, and the
    steps shuffled. Each bucket's left-over samples make a smaller step; none is dropped or repeated. Linear in the
    number of samples (radix sort).

    Args:
        buckets: (n,) integers; samples of one value have one shape.
        samples_per_step: Samples of one optimiser step, over all ranks and accumulated batches.
    """
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    n = len(buckets)
    order = rng.permutation(n).astype(np.int64) if shuffle else np.arange(n, dtype=np.int64)
    order = order[np.argsort(buckets[order], kind="stable")]
    starts: list[NDArray[np.int64]] = []
    lengths: list[NDArray[np.int64]] = []
    _, bucket_starts, counts = np.unique(buckets[order], return_index=True, return_counts=True)
    for start, count in zip(bucket_starts, counts, strict=True):
        begin = np.arange(start, start + count, samples_per_step, dtype=np.int64)
        starts.append(begin)
        lengths.append(np.minimum(samples_per_step, start + count - begin))
    if not starts:
        return EpochPlan(order, np.zeros(1, dtype=np.int64))
    begin, length = np.concatenate(starts), np.concatenate(lengths)
    turn = rng.permutation(len(begin)) if shuffle else np.arange(len(begin))
    begin, length = begin[turn], length[turn]
    bounds = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    inside = np.arange(n) - np.repeat(bounds[:-1], length)
    return EpochPlan(order[np.repeat(begin, length) + inside], bounds)


def steps_in_epoch(buckets: NDArray[Any], samples_per_step: int) -> int:
    """Return how many steps ``plan_epoch`` makes: the same every epoch."""
    return int((-(-np.unique(buckets, return_counts=True)[1] // samples_per_step)).sum())


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank: samples of the store, and the weight of each (0 for a filler)."""

    samples: tuple[int, ...]
    weights: tuple[float, ...]


def share_of_rank(step: NDArray[np.int64], batch_size: int, rank: int, world: int) -> list[MicroBatch]:
    """A rank's micro-batches of a step. Every rank gets the same number, so that collectives meet.

    Where a left-over step has fewer samples than ranks, a rank that would be idle repeats a sample with weight 0.
    """
    share = -(-len(step) // world)
    own = step[rank * share : (rank + 1) * share]
    padded = [int(s) for s in own] + [int(step[0])] * (share - len(own))
    weights = [1.0] * len(own) + [0.0] * (share - len(own))
    return [
        MicroBatch(tuple(padded[i : i + batch_size]), tuple(weights[i : i + batch_size]))
        for i in range(0, share, batch_size)
    ]


def draw_seed(*parts: object) -> int:
    """63 bits from a hash of the parts: a separate random stream for every (seed, epoch, sample, purpose)."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
