"""Reads the samples of a batch: windows of a pair's latents, whitened, the condition aligned by position.

Shapes: B batch, C latent channels, D depth, H rows, W columns, all in latents; lower-case for one sample's own size.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.config import DataConfig
from diffusion.data.epoch_plan import MicroBatch, draw_seed
from diffusion.data.pairs import PlannedLatent, PlannedPair, PlannedPairs
from diffusion.data.z_alignment import align_depth
from latentcache import COMPRESSION, LATENT_CHANNELS, LatentGrid, LatentStore, NonFiniteError

Memory = NDArray[np.float32]


class Recycled:
    """Float32 tensors from a pool, for any thread.

    Not for page-locked memory: there a copy to the GPU may still be under way when the last reference goes. Torch's own
    allocator of such memory knows of those copies, and recycles too.

    Args:
        keep: Pieces of memory that wait to be used again; of more, the oldest are freed.
    """

    def __init__(self, keep: int) -> None:
        # No lock: a finalizer runs wherever the last reference goes, which may be in the middle of ``_take``. Every
        # operation on a deque is whole by itself.
        self._free: deque[Memory] = deque(maxlen=keep)

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of arbitrary values. Its memory comes back when the tensor and all its views are gone."""
        count = math.prod(shape)
        memory = self._take(count)
        lent = memory[:count]
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(shape)

    def _take(self, count: int) -> Memory:
        for _ in range(len(self._free)):
            try:
                memory = self._free.popleft()
            except IndexError:
                break
            if count <= len(memory) <= 2 * count:
                return memory
            self._free.append(memory)
        return np.empty(count, np.float32)


Batch = dict[str, Any]
"""``thin condition`` (B, 4, D, H, W) float32, whitened; ``mask`` (B, 1, D, H, W) float32, 1 where a latent holds
scanned voxels; ``told`` (B, 6, D) float32, see ``networks.acquisition``, where the stream was asked for it;
``thick``: list of (4, d, H, W), the whitened latents that each condition was made of; ``z_mm`` (B, D) float64;
``study_key pair_key category``: lists of str; ``num_thin_slices num_thick_slices`` (B,) int64, of the whole series;
``weight`` (B,) float32, 0 for a filler; ``noise_seed``: list of int, the sample's own random stream in this epoch."""


HALF_LIMIT = 65_536.0
"""Above every finite float16."""
SIGN_AND_VALUE = np.int32(0x0FFFE000 - 0x80000000)
"""The sign, and the 15 bits that a float16's exponent and fraction have in float32."""
KEPT_PIECES = 8
"""Pieces of memory kept between batches, which take three each; at most one batch is let go while one is read."""


@dataclass(frozen=True)
class Sample:
    """A window of a pair: where it is in the thin latent, and its random stream."""

    pair: PlannedPair
    depth: slice
    rows: slice
    columns: slice
    noise_seed: int

    @property
    def z_mm(self) -> NDArray[np.float64]:
        """(D,) positions of the window's latent slices."""
        thin = self.pair.thin
        return LatentGrid.of_row(thin).positions(thin.shape[1])[self.depth]


@dataclass(frozen=True)
class Mirrored:
    """Pairs that are cached mirrored: ``at[i]`` is the place among them of pair i of the stream, -1 for none."""

    pairs: PlannedPairs
    at: NDArray[np.int64]

    @classmethod
    def of(cls, pairs: PlannedPairs, stream: PlannedPairs) -> Mirrored:
        """Find a stream's pairs among mirrored ones. One whose grid differs (encoded otherwise) counts as absent."""
        at = pairs.places_among(stream)
        there = np.flatnonzero(at >= 0)
        same = (pairs.thin.shape[at[there]] == stream.thin.shape[there]).all(axis=1)
        same &= (pairs.first[at[there]] == stream.first[there]) & (pairs.depth[at[there]] == stream.depth[there])
        at[there[~same]] = -1
        return cls(pairs, at)


class BatchReader:
    """Micro-batches of a planned split, from any thread.

    Args:
        shapes: (n, 3) depth, rows and columns of every pair's samples.
        mean, std: (4,) float32, the whitening.
        seed: Windows and noise follow from it, the epoch and the pair's key.
        pin_memory: Batches lie in page-locked memory, whence a GPU copies them while it computes.
    """

    def __init__(
        self,
        store: LatentStore,
        pairs: PlannedPairs,
        shapes: NDArray[np.int64],
        data: DataConfig,
        *,
        mean: NDArray[np.float32],
        std: NDArray[np.float32],
        seed: int,
        pin_memory: bool = False,
    ) -> None:
        self.store, self.pairs, self.shapes, self.data = store, pairs, shapes, data
        self.mean, self.std = (values[:, None, None, None] for values in (mean, std))
        self.seed, self.pin_memory = seed, pin_memory
        self.mirrored: Sequence[Mirrored] = ()
        """The same pairs mirrored, to draw from."""
        self._own, self._recycled = threading.local(), Recycled(KEPT_PIECES)

    def size(self, micro: MicroBatch) -> int:
        """Bytes of the batch's tensors, give or take the positions and a separate thick latent."""
        voxels = int(np.prod(self.shapes[micro.samples[0] // self.data.windows_per_volume]))
        return len(micro.samples) * voxels * (2 * LATENT_CHANNELS + 1) * 4

    def load(self, micro: MicroBatch, epoch: int) -> Batch:
        """Read the samples of a micro-batch, each into its place.

        Raises:
            CorruptLatentError: Bytes are missing or changed; names the series' key.
            NonFiniteError: A latent is not finite once whitened.
        """
        samples = [self._sample(index, epoch) for index in micro.samples]
        first = samples[0]
        depth, rows, columns = (s.stop - s.start for s in (first.depth, first.rows, first.columns))
        thin, condition, mask = (
            self._empty((len(samples), channels, depth, rows, columns))
            for channels in (LATENT_CHANNELS, LATENT_CHANNELS, 1)
        )
        thick = []
        for n, sample in enumerate(samples):
            self._read(sample.pair.thin, sample.depth, sample, thin[n])
            thick.append(self._condition(sample, condition[n]))
            fill_valid(mask[n].numpy(), sample.pair.thin.valid_zyx, sample.rows.start, sample.columns.start)
        counts = [(s.pair.thin.valid_zyx[0], s.pair.num_thick_slices) for s in samples]
        small = {
            "z_mm": torch.from_numpy(np.stack([s.z_mm for s in samples])),
            **self._told(samples),
            "weight": torch.tensor(micro.weights, dtype=torch.float32),
            "num_thin_slices": torch.tensor([count for count, _ in counts]),
            "num_thick_slices": torch.tensor([count for _, count in counts]),
        }
        return {
            "thin": thin,
            "condition": condition,
            "mask": mask,
            **{name: value.pin_memory() if self.pin_memory else value for name, value in small.items()},
            "study_key": [s.pair.study_key for s in samples],
            "pair_key": [s.pair.pair_key for s in samples],
            "category": [s.pair.category for s in samples],
            "noise_seed": [s.noise_seed for s in samples],
            "thick": thick,
        }

    @staticmethod
    def _told(samples: list[Sample]) -> dict[str, Tensor]:
        seen = [s.pair.thick.seen_from(s.z_mm) for s in samples if s.pair.thick is not None]
        return {"told": torch.from_numpy(np.stack(seen))} if seen else {}

    def _sample(self, index: int, epoch: int) -> Sample:
        pair = self.pairs[index // self.data.windows_per_volume]
        depth, rows, columns = (int(n) for n in self.shapes[index // self.data.windows_per_volume])
        identity = (self.seed, epoch, pair.pair_key, index % self.data.windows_per_volume)
        rng = np.random.Generator(np.random.PCG64(draw_seed("window", *identity)))
        z = pair.first + int(rng.integers(pair.depth - depth + 1))
        y = int(rng.integers(pair.thin.shape[2] - rows + 1))
        x = int(rng.integers(pair.thin.shape[3] - columns + 1))
        pair = self._drawn(index // self.data.windows_per_volume, pair, identity)
        return Sample(
            pair, slice(z, z + depth), slice(y, y + rows), slice(x, x + columns), draw_seed("noise", *identity)
        )

    def _drawn(self, row: int, pair: PlannedPair, identity: tuple[object, ...]) -> PlannedPair:
        """The pair as it is, or mirrored, with equal chances among those cached; validation never asks."""
        there = [one for one in self.mirrored if one.at[row] >= 0]
        chosen = draw_seed("mirror", *identity) % (len(there) + 1)
        return pair if chosen == 0 else there[chosen - 1].pairs[int(there[chosen - 1].at[row])]

    def _condition(self, sample: Sample, out: Tensor) -> Tensor:
        """Fill in the condition on the thin window's positions; returns the latents that it is made of."""
        record = sample.pair.condition
        if record.role != "thick":
            self._read(record, sample.depth, sample, out)
            return out
        z_mm = sample.z_mm
        z_from = LatentGrid.of_row(record).positions(record.shape[1])
        low = max(0, int(np.searchsorted(z_from, z_mm[0], side="right")) - 1)
        high = min(record.shape[1], int(np.searchsorted(z_from, z_mm[-1], side="left")) + 1)
        low, high = min(low, record.shape[1] - 1), max(high, 1)
        thick = torch.empty((out.shape[0], high - low, *out.shape[2:]))
        self._read(record, slice(low, high), sample, thick)
        out.copy_(align_depth(thick, z_from[low:high], z_mm))
        return thick

    def _read(self, record: PlannedLatent, depth: slice, sample: Sample, out: Tensor) -> None:
        """Slices ``depth`` of a latent in the sample's rows and columns, whitened, into (4, d, H, W) float32."""
        scratch = self._scratch((record.shape[0], depth.stop - depth.start, *record.shape[2:]))
        raw = self.store.read(record, depth=depth, out=scratch)
        # Where log-variances are stored too, they follow the means.
        whitened = out.numpy()
        widen(raw[:LATENT_CHANNELS, :, sample.rows, sample.columns], whitened)
        finite = whitened.min() > -HALF_LIMIT and whitened.max() < HALF_LIMIT
        whitened -= self.mean
        whitened /= self.std
        if not (finite and np.isfinite(whitened).all()):
            raise NonFiniteError(
                f"a {record.role} latent of series {record.key} holds NaN or infinity once whitened",
                expected="finite latents",
                remedy="Run `ctpipe verify STORE`, then encode the series again or exclude it.",
            )

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, pin_memory=True) if self.pin_memory else self._recycled.empty(shape)

    def _scratch(self, shape: tuple[int, ...]) -> NDArray[np.float16]:
        """This thread's own memory, used again: fresh pages cost more than the reading."""
        count = int(np.prod(shape))
        held: NDArray[np.float16] | None = getattr(self._own, "scratch", None)
        if held is None or len(held) < count:
            held = self._own.scratch = np.empty(count, np.float16)
        return held[:count].reshape(shape)


def widen(half: NDArray[np.float16], out: NDArray[np.float32]) -> None:
    """float16 into float32 of the same shape, exactly; infinity and NaN become values of 65536 and more.

    The exponent's field moves into place as it is and is 112 too small (IEEE 754-2019, table 3.5: biases 15 and 127).
    NumPy's own conversion goes element by element, some seven times slower; torch's spreads over threads, of which
    every reader would have a set, or is a hundred small calls, which leave the trainer's thread no turn between
    them. On a thread that flushes denormals, values below 6.1e-5 become zero.
    """
    bits = out.view(np.int32)
    np.copyto(bits, half.view(np.int16))  # extends the sign
    bits <<= 13
    bits &= SIGN_AND_VALUE
    out *= np.float32(2.0**112)


def fill_valid(mask: NDArray[np.float32], valid_zyx: tuple[int, int, int], row: int = 0, column: int = 0) -> None:
    """Make (1, D, H, W) 1 where a latent covers at least one scanned voxel in-plane, 0 in the padding.

    Along depth every latent of a window is inside the scan by construction.

    Args:
        row, column: Where the mask's plane begins in the latent's.
    """
    rows, columns = (-(-n // COMPRESSION) for n in valid_zyx[1:])
    mask[...] = 0.0
    mask[:, :, : max(0, rows - row), : max(0, columns - column)] = 1.0
