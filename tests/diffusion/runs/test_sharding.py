"""What FSDP2 splits is recognised where it has split, and costs nothing where it has not."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from diffusion.runs import full_tensor, is_fsdp
from diffusion.runs.sharding import is_dtensor
from tests.support.gloo_ranks import on_ranks


def test_what_is_not_split_is_whole() -> None:
    tensor = torch.ones(3)
    assert full_tensor(tensor) is tensor
    assert not is_dtensor(tensor)
    assert not is_fsdp(nn.Linear(2, 2))


SPLIT = """
import torch
from torch import nn
from diffusion.runs import full_tensor, is_fsdp
from diffusion.runs.sharding import is_dtensor
from diffusion.training.distributed import join, leave, shard
world = join()
torch.manual_seed(0)
net = nn.Linear(4, 4)
whole = net.weight.detach().clone()
sharded = shard(net, world)
print(is_fsdp(sharded), is_dtensor(net.weight), torch.equal(full_tensor(net.weight), whole), is_dtensor(whole))
leave()
"""


def test_what_is_split_is_known_and_gathered() -> None:
    assert on_ranks(SPLIT) == ["True True True False\n"] * 2


def test_a_process_that_samples_or_trains_alone_does_not_load_what_splits() -> None:
    """0.6 s of a core of every command and worker that opens a checkpoint."""
    code = """
import sys
import diffusion.training.train
from diffusion.runs import CheckpointFolder
from diffusion.sampling import Interpolator
from diffusion.training.distributed import spread
print([name for name in ("torch.distributed.tensor", "torch.distributed.fsdp") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
