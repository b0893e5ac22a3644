"""Questions about what FSDP2 has split among processes, asked without importing it.

`torch.distributed.tensor` and `torch.distributed.fsdp` take 0.6 s of a core to import, of which a process that samples
or decodes needs nothing. One that has not imported them holds nothing that they have made.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(tensor: Any) -> TypeIs[DTensor]:
    """Return whether a tensor is split among processes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fsdp(module: object) -> TypeIs[FSDPModule]:
    """Return whether FSDP2 has split a module's parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole: gathered from all processes, which all must ask, or itself where it is not split."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor
