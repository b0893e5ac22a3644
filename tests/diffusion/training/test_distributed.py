"""Two ranks over gloo: what FSDP2 and checkpoints do between them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffusion.data import make_store
from diffusion.training import World, distributed as world_module
from diffusion.training.distributed import spread
from tests.support.gloo_ranks import on_ranks

SETUP = """
import json, sys
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from diffusion.networks.config import UNetConfig
from diffusion.networks.unet import build_unet
from diffusion.training.distributed import join, leave, spread
torch.set_num_threads(1)
world = join()
CONFIG = UNetConfig(16, (1, 2), 1, (1,), 2, 32, 4)

def network():
    torch.manual_seed(0)
    net = build_unet(CONFIG)
    for parameter in net.parameters():  # zero-initialised layers would hide the others
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return net

def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()

def inputs():
    torch.manual_seed(5)
    return torch.randn(2, 8, 4, 8, 8), torch.tensor([0.30001, 0.9])
"""


CHANNELS_LAST = """
# Every stage is sharded on its own here, as the stages of `medium` are.
import diffusion.training.distributed as module
module._large_children.__defaults__ = (1,)
results = {}
for strategy in ("ddp", "fsdp"):
    net = network().to(memory_format=torch.channels_last_3d)
    seen = []
    net.down[0].register_forward_hook(
        lambda _m, _i, out: seen.append(out.is_contiguous(memory_format=torch.channels_last_3d)))
    model = spread(net, world, strategy)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = model(*inputs()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    results[strategy] = {"losses": losses, "channels_last": all(seen),
                         "shards": sum(isinstance(p, DTensor) for p in net.parameters()) }
print(json.dumps(results))
leave()
"""


def test_fsdp_starts_with_channels_last_weights_and_keeps_the_layout_of_activations() -> None:
    for out in on_ranks(SETUP + CHANNELS_LAST):
        results = json.loads(out)
        assert results["fsdp"]["shards"] > 0
        assert results["ddp"]["channels_last"]
        assert results["fsdp"]["channels_last"]
        assert results["fsdp"]["losses"] == pytest.approx(results["ddp"]["losses"], rel=1e-5)
        assert results["fsdp"]["losses"][0] > results["fsdp"]["losses"][2]


HALF = """
import diffusion.training.distributed as module
module._large_children.__defaults__ = (1,)
results = {}
for strategy in ("ddp", "fsdp"):
    net = network()
    dtypes = {"conv": set(), "time": set()}
    net.down[0].block.conv1.register_forward_pre_hook(lambda m, _: dtypes["conv"].add(str(m.weight.dtype)))
    net.time.register_forward_pre_hook(lambda _m, inputs: dtypes["time"].add(str(inputs[0].dtype)))
    model = spread(net, world, strategy, bf16=True)
    for number in (1, 2):  # the first backward pass exchanges nothing, as in an accumulated step
        module.gradients_meet(model, number == 2).__enter__() if strategy == "fsdp" else None
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*inputs()).float().square().mean()
        loss.backward()
    gradients = {n: whole(p.grad) for n, p in net.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    results[strategy] = {"loss": float(loss), "norm": float(norm),
                         "gradients": sorted({str(g.dtype) for g in gradients.values()}),
                         "weights": sorted({str(p.dtype) for p in net.parameters()}),
                         **{k: sorted(v) for k, v in dtypes.items()}}
print(json.dumps(results))
leave()
"""


def test_fsdp_gathers_in_bf16_where_it_computes_in_bf16_and_sums_gradients_in_float32() -> None:
    (first, _) = (json.loads(out) for out in on_ranks(SETUP + HALF))
    ddp, fsdp = first["ddp"], first["fsdp"]
    assert (ddp["conv"], fsdp["conv"]) == (["torch.float32"], ["torch.bfloat16"])
    assert fsdp["time"] == ["torch.float32"], "times that are rounded to bf16 fall together"
    assert fsdp["gradients"] == fsdp["weights"] == ["torch.float32"]
    assert fsdp["loss"] == pytest.approx(ddp["loss"], rel=1e-2)
    assert fsdp["norm"] == pytest.approx(ddp["norm"], rel=2e-2)


MAX_MODE = """
import sys, json, torch
from diffusion.config import load_config
import importlib; train_module = importlib.import_module("diffusion.training.train")
from diffusion.runs.training_log import read_log
from diffusion.training.distributed import leave
from latentcache.store import LatentStore
torch.set_num_threads(1)
store, run, *overrides = sys.argv[1:]
train_module.train(LatentStore.open(store), run, load_config("tiny", None, overrides)[0])
leave()
"""

SMALL = [
    "model.width=8", "model.multipliers=[1,2]", "model.attention_levels=[1]", "model.heads=2", "model.groups=4",
    "model.time_embedding=16", "model.latent_patch=1", "data.window=4", "data.crop=8", "data.windows_per_volume=3",
    "data.batch_size=1", "data.readers=1", "optimiser.samples_per_step=4", "optimiser.warmup_steps=3",
    "validation.every_epochs=1", "checkpoint_every_steps=1000", "budget.max_seconds=null", "optimiser.steps=14",
    "validation.mode=max",
]  # fmt: skip


def test_a_validation_that_is_not_the_best_changes_no_later_step_under_fsdp(tmp_path: Path) -> None:
    """The root stays gathered after a forward pass without gradients: with the averages, unless it is resharded. A
    loss that falls is never the best where more is better, so no checkpoint reshards the root by the way."""
    store = make_store(tmp_path / "s", side=8)
    losses: dict[str, list[float]] = {}
    for strategy in ("ddp", "fsdp"):
        run = tmp_path / strategy
        on_ranks(MAX_MODE, [store.url.removeprefix("file://"), str(run), *SMALL, f"parallel.strategy={strategy}"])
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines if x["kind"] == "validation"] == [3, 6, 9, 12, 14]
        losses[strategy] = [x["loss"] for x in lines if x["kind"] == "train"]
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=1e-5)


CHECKPOINT = """
from pathlib import Path
from diffusion.runs.checkpoint import CheckpointError, CheckpointFolder, contents_bytes, gather, load_on_first, restore
from diffusion.runs.ema import PowerEma
strategy, folder = sys.argv[1], CheckpointFolder(Path(sys.argv[2]))

def trained(steps):
    net = network().to(memory_format=torch.channels_last_3d)
    model = spread(net, world, strategy)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    ema = PowerEma(net, 0.1)
    for step in range(1, steps + 1):
        advance(model, optimizer)
        ema.update(step)
    return net, model, optimizer, ema

def advance(model, optimizer):
    optimizer.zero_grad()
    model(*inputs()).square().mean().backward()
    optimizer.step()

net, model, optimizer, ema = trained(2)
contents = gather(net, optimizer, ema, {"step": 2, "note": "x"}, keep=world.rank == 0)
held = sum(t.nbytes for g in (contents.weights, contents.average, contents.training) for t in g.values()
           if not t.is_meta)
if world.rank == 0:
    folder.save(contents)
world.barrier()
read = []
real = folder.load
folder.load = lambda which="last": read.append(which) or real(which)
other, other_model, other_optimizer, other_ema = trained(1)
loaded = load_on_first(folder)
restore(loaded, other, other_optimizer, other_ema)
advance(model, optimizer)
advance(other_model, other_optimizer)
same = all(torch.equal(whole(a), whole(b)) for a, b in zip(net.parameters(), other.parameters()))
same &= all(torch.equal(whole(a), whole(b)) for a, b in zip(ema.average, other_ema.average))
damaged = ""
if world.rank == 0:
    path = folder.path() / "ema.safetensors"
    data = bytearray(path.read_bytes()); data[-3] ^= 4; path.write_bytes(data)
world.barrier()
try:
    load_on_first(folder)
except CheckpointError as error:
    damaged = str(error)
print(json.dumps({"held": held, "read": len(read), "same": same, "note": loaded.state["note"], "damaged": damaged}))
leave()
"""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_one_rank_alone_holds_a_checkpoint_and_reads_it_and_all_resume_to_the_bit(
    tmp_path: Path, strategy: str
) -> None:
    first, second = (json.loads(out) for out in on_ranks(SETUP + CHECKPOINT, [strategy, str(tmp_path)]))
    assert first["held"] > 100_000
    assert second["held"] < 10_000, "torch's random state and nothing else"
    assert (first["read"], second["read"]) == (2, 0), "once whole, once damaged"
    for rank in (first, second):
        assert rank["same"]
        assert rank["note"] == "x"
        assert "ema.safetensors does not match its checksum" in rank["damaged"], "all ranks end alike"


def test_compilation_comes_after_sharding_and_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    class Block(nn.Linear):
        def compile(self, *arguments: Any, **options: Any) -> None:
            compiled.append(type(self).__name__)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(2, 2), Block(2, 2)])

        def compile(self, *arguments: Any, **options: Any) -> None:
            compiled.append(type(self).__name__)

    monkeypatch.setattr(world_module._large_children, "__defaults__", (1,))
    world_module.compile_after_spreading(spread(Net(), World(), "fsdp"), "whole", "eager")
    assert compiled == ["Net"], "one process: nothing is sharded"
    compiled.clear()
    monkeypatch.setattr(world_module, "is_fsdp", lambda module: isinstance(module, Net))
    world_module.compile_after_spreading(Net(), "blocks", "eager")
    assert compiled == ["Block", "Block"], "a graph around a gather would hold the weights of its first call"


COMPILED = """
import diffusion.training.distributed as module
from torch.distributed.fsdp import FSDPModule
module._large_children.__defaults__ = (1,)
results = {}
for extent in (False, "blocks"):
    net = network()
    model = spread(net, world, "fsdp")
    if extent:
        module.compile_after_spreading(net, extent, "eager")
    compiled = [type(m).__name__ for m in net.modules() if m._compiled_call_impl is not None or "forward" in vars(m)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = model(*inputs()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    sharded = any(isinstance(m, FSDPModule) and m._compiled_call_impl is not None for m in net.modules())
    results[str(extent)] = {"losses": losses, "compiled": sorted(set(compiled)), "sharded": sharded,
                            "names": sorted(net.state_dict())}
print(json.dumps(results))
leave()
"""


def test_compiled_blocks_of_a_sharded_network_train_as_the_network_does() -> None:
    for out in on_ranks(SETUP + COMPILED):
        plain, compiled = json.loads(out).values()
        assert plain["compiled"] == []
        assert compiled["compiled"] == ["DepthAttention", "FSDPResidualBlock", "ResidualBlock"]
        assert not compiled["sharded"], "a gather of weights would be in the graph"
        assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert compiled["names"] == plain["names"], "a checkpoint of the one is one of the other"


FIRST = """
from types import SimpleNamespace
from diffusion.training.validation import on_first_rank, whole_weights
net = network()
expected = {n: t.clone() for n, t in net.state_dict().items()}
spread(net, world, "fsdp")
weights = whole_weights(net, world)
kept = sum(t.numel() for t in weights.values())
same = all(torch.equal(expected[n], t) for n, t in weights.items())
seen = []
def figures(unet):
    seen.append(all(torch.equal(expected[n], t) for n, t in unet.state_dict().items()))
    return {"x": 4.0}
found = on_first_rank(figures, net, SimpleNamespace(unet_config=CONFIG), world)
print(json.dumps([kept, same, seen, found, sum(t.numel() for t in expected.values())]))
leave()
"""


def test_a_validation_on_the_first_rank_leaves_no_whole_weights_on_the_others() -> None:
    (first, second) = (json.loads(out) for out in on_ranks(SETUP + FIRST))
    count = first[-1]
    assert first == [count, True, [True], {"x": 4.0}, count]
    assert second == [0, True, [], {"x": 4.0}, count]


def test_any_is_the_plain_answer_of_one_process() -> None:
    assert World().any(True)
    assert not World().any(False)
    assert torch.equal(World().sum(torch.ones(2)), torch.ones(2))
