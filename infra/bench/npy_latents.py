"""Pairs of latents in .npy files, for a machine that has torch and numpy alone; used by gpu_speed.py."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion.data import prefetch

Shape = tuple[int, int, int]
Pair = tuple[Tensor, Tensor]
"""Thin and condition, (B, 4, D, H, W) float32, whitened, in pinned memory where there is a GPU."""


class Latents:
    """Pairs in .npy files, whitened as they are read; the moments are those of the thin latents."""

    def __init__(self, folder: Path) -> None:
        names = sorted(folder.glob("thin-*.npy"))
        self.pairs = [(name, name.with_name(name.name.replace("thin", "condition"))) for name in names]
        flat = [np.load(thin).astype(np.float32).reshape(4, -1) for thin, _ in self.pairs]
        shape = (4, 1, 1, 1)
        self.mean = np.mean([f.mean(1) for f in flat], axis=0).reshape(shape)
        self.std = np.sqrt(np.mean([f.var(1) for f in flat], axis=0)).reshape(shape)

    @classmethod
    def make_up(cls, folder: Path, shape: Shape, n: int = 4) -> Latents:
        """Noise, its running mean along depth being the condition."""
        rng = np.random.default_rng(0)
        for number in range(n):
            thin = rng.standard_normal((4, *shape), dtype=np.float32)
            np.save(folder / f"thin-{number:04d}.npy", thin.astype(np.float16))
            mean = (np.roll(thin, 1, 1) + thin + np.roll(thin, -1, 1)) / 3
            np.save(folder / f"condition-{number:04d}.npy", mean.astype(np.float16))
        return cls(folder)

    def read(self, pair: tuple[Path, Path], depth: slice) -> list[Tensor]:
        """Thin and condition, (4, d, H, W)."""
        found = (np.load(path, mmap_mode="r")[:, depth].astype(np.float32) for path in pair)
        return [torch.from_numpy((x - self.mean) / self.std) for x in found]

    def batches(self, batch: int, device: torch.device, depth: int) -> Iterator[Pair]:
        """Random windows of that depth, without end, read ahead by two threads."""
        tasks = (partial(self._batch, number, batch, depth, device.type == "cuda") for number in count())
        return prefetch(tasks, threads=2, ahead=4)

    def _batch(self, number: int, batch: int, depth: int, pinned: bool) -> Pair:
        rng = np.random.default_rng([1, number])
        samples = []
        for _ in range(batch):
            pair = self.pairs[int(rng.integers(len(self.pairs)))]
            whole = np.load(pair[0], mmap_mode="r").shape[1]
            start = int(rng.integers(max(1, whole - depth + 1)))
            samples.append(self.read(pair, slice(start, start + depth)))
        thin, condition = (torch.stack(part) for part in zip(*samples, strict=True))
        return (thin.pin_memory(), condition.pin_memory()) if pinned else (thin, condition)
