"""Memory for batches, used again once nothing refers to it.

Fresh pages for every batch cost the readers more than the reading, and giving them back costs the trainer's thread a
millisecond for every 15 MB: most of what waiting for data is, once everything else happens elsewhere.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
