"""Read pairs of latents with PyTorch, without ctpipe's trainer: a data set for a model of your own.

python infra/examples/latents_in_torch.py STORE
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ctpipe import LatentStore


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Condition and thin latents of a split, each (4, d, h, w) float32, whitened by the training split's moments."""

    def __init__(self, store: LatentStore, split: str = "train") -> None:
        self.store = store
        found = [
            (store.find(pair.pair_key, "thick_on_thin"), store.find(pair.thin_key, "thin"))
            for pair in store.pairs()
            if pair.split == split
        ]
        self.rows = [(condition, thin) for condition, thin in found if condition is not None and thin is not None]
        thin = torch.cat([self._read(row).flatten(1) for _, row in self.rows], dim=1)
        self.mean, self.std = (figure.view(4, 1, 1, 1) for figure in (thin.mean(1), thin.std(1)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        condition, thin = ((self._read(row) - self.mean) / self.std for row in self.rows[index])
        return condition, thin

    def _read(self, row: object) -> Tensor:
        return torch.from_numpy(self.store.read(row)).float()  # type: ignore[arg-type]


def main(store: str) -> None:
    """Print the mean squared difference between condition and thin latents of every training pair."""
    for condition, thin in DataLoader(Pairs(LatentStore.open(store)), batch_size=1):
        print(tuple(thin.shape), f"{float((condition - thin).square().mean()):.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
