"""Attention of many short sequences: columns along depth, one for every in-plane position of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_COLUMNS = 65_535
"""A CUDA grid's second and third dimensions end here, and the attention kernels put sequences on one of them (pytorch
issues 142228 and 146704)."""


def column_attention(q_PNTK: Tensor, k_PNTK: Tensor, v_PNTK: Tensor) -> Tensor:
    """Scaled dot-product attention of P independent columns, as many at once as the kernels take; (P, N, T, K)."""
    if len(q_PNTK) <= MOST_COLUMNS:
        return F.scaled_dot_product_attention(q_PNTK, k_PNTK, v_PNTK)
    parts = zip(*(torch.split(x, MOST_COLUMNS) for x in (q_PNTK, k_PNTK, v_PNTK)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(q, k, v) for q, k, v in parts])
