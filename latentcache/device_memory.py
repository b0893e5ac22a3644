"""Whose the memory of a GPU is, for messages about too little of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def held_by_others(device: torch.device) -> str:
    """Return how much of a GPU's memory other processes hold, as the end of a sentence.

    Empty where it is none to speak of, and for a CPU.
    """
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return ""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    # A process's own context and libraries take about half a GiB, which nobody counts.
    if others < 2**30:
        return ""
    return f"; other processes hold about {others / 2**30:.1f} of its {total / 2**30:.1f} GiB (`nvidia-smi` names them)"
