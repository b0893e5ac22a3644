"""Recomputation `auto`: the cheapest blocks that fit, and gradients that do not depend on the choice."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from diffusion.config.load import train_preset
from diffusion.config.overrides import apply
from diffusion.networks import UNetConfig, build_unet, model_preset
from diffusion.training.recompute import BlockCost, block_costs, bytes_of, cheapest
from latentcache import InputError

SMALL = UNetConfig(
    width=8, multipliers=(1, 2), blocks_per_level=1, attention_levels=(1,), heads=2, time_embedding=16, groups=4
)


def test_costs_are_of_every_block_and_what_autograd_keeps() -> None:
    costs = block_costs(SMALL, 1, (4, 8, 8), bf16=False, fused=False)
    assert len(costs) == len(build_unet(SMALL).blocks()) == 8
    assert all(c.kept_bytes > c.input_bytes > 0 and c.flops > 0 for c in costs)
    twice = block_costs(SMALL, 2, (4, 8, 8), bf16=False, fused=False)
    assert all(b.flops == pytest.approx(2 * a.flops, rel=0.05) for a, b in zip(costs, twice, strict=True))


def test_the_kernels_keep_less() -> None:
    plain, fused = (block_costs(SMALL, 1, (4, 8, 8), bf16=True, fused=f) for f in (False, True))
    assert sum(c.kept_bytes for c in fused) < 0.9 * sum(c.kept_bytes for c in plain)


def test_room_for_everything_recomputes_nothing_and_room_for_nothing_everything() -> None:
    costs = block_costs(SMALL, 1, (4, 8, 8), bf16=False, fused=False)
    assert cheapest(costs, 1e12) == frozenset()
    assert cheapest(costs, 0) == frozenset(range(len(costs)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.builds(BlockCost, st.integers(20, 100), st.integers(1, 20), st.floats(1, 50)), min_size=1, max_size=7),
    st.floats(0, 1),
)
def test_what_is_chosen_fits_and_nothing_of_it_is_needless(costs: list[BlockCost], share: float) -> None:
    """Where it fits, no block of it can be kept instead; where it does not, all are recomputed."""
    room = share * bytes_of(costs, frozenset())
    chosen = cheapest(costs, room)
    sets = [frozenset(s) for n in range(len(costs) + 1) for s in combinations(range(len(costs)), n)]
    fitting = [s for s in sets if bytes_of(costs, s) <= room]
    if bytes_of(costs, chosen) <= room:
        assert not any(chosen - {i} in fitting for i in chosen)
    else:
        assert chosen == frozenset(range(len(costs)))


def test_gradients_do_not_depend_on_the_choice() -> None:
    found = []
    for chosen in ((), (0, 3), tuple(range(8))):
        torch.manual_seed(0)
        net = build_unet(replace(SMALL, activation_checkpointing="auto")).train()
        torch.nn.init.normal_(net.conv_out.weight, 0, 0.1)
        net.recompute(chosen)
        x = torch.randn((1, 8, 4, 8, 8), generator=torch.Generator().manual_seed(1))
        calls: list[int] = []
        for block in net.blocks():
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        net(x, torch.ones(1)).square().sum().backward()
        assert len(calls) == 8 + len(chosen)
        assert net.conv_in.weight.grad is not None
        found.append(net.conv_in.weight.grad)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert set(build_unet(SMALL).state_dict()) == set(net.state_dict())


def test_medium_at_the_fine_grid_needs_some_blocks_again_on_80_gb() -> None:
    """Batch 1 at 75x128x128 by PyTorch's own norms did not fit 80 GB uncheckpointed; nor does it have to recompute
    every block."""
    costs = block_costs(model_preset("medium"), 1, (75, 128, 128), bf16=True, fused=True)
    chosen = cheapest(costs, 55 * 2**30)
    again = sum(costs[i].flops for i in chosen) / sum(c.flops for c in costs)
    assert bytes_of(costs, chosen) <= 55 * 2**30
    assert again < 1.0


def test_the_configuration_takes_auto() -> None:
    config = apply(train_preset("tiny"), {"model": {"activation_checkpointing": "auto"}}, "--set")
    assert config.model.activation_checkpointing == "auto"
    with pytest.raises(InputError, match="auto"):
        apply(train_preset("tiny"), {"model": {"activation_checkpointing": "sometimes"}}, "--set")
