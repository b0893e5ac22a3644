"""The shipped refiner's training: patches that are what they say, resumed to the same weights, learning at all."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "infra"))

from pretrained_data import PatchSize, Scan, ScanDrawing, Source, cut, draw_scan
from train_pretrained import (
    LEAST_DEPTH,
    Recipe,
    State,
    begin,
    drawn,
    export,
    forward,
    grow,
    held_out_gain,
    keep,
    rate,
    tensors,
    train_step,
)

from pipeline.forward_model import SliceProfile
from pipeline.refiner import NetworkConfig, PretrainedNetwork, load_pretrained
from pipeline.refiner.pretrained_network import GAIN, contrasts

RECIPE = Recipe(width=8, blocks=1, head=4, batch=2, phantoms=0, cells=6, thick=4, thin=8, warmup_steps=2)
BOX = SliceProfile("box", 5.0)


def wedges(seed: int = 0) -> Source:
    """Soft tissue and bone in air, cut by planes that run obliquely through the slices."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(np.arange(60.0), np.arange(64) * 0.8, np.arange(64) * 0.8, indexing="ij")
    hu = np.full(z.shape, -1000.0)
    for value in (40.0, -100.0, 60.0, 700.0, -850.0, 50.0):
        a, b, c = rng.normal(size=3)
        hu[a * (z - 30) + b * (y - 25) + c * (x - 25) > rng.normal(0, 8)] = value
    return Source(f"wedges-{seed}", hu.astype(np.int16), (1.0, 0.8, 0.8))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_any_scan_gives_a_patch_of_whole_cells(seed: int) -> None:
    rng = np.random.default_rng(seed)
    source = wedges()
    patch = cut(source, draw_scan(source, ScanDrawing(), rng), PatchSize(6, 5, 12), rng)
    assert patch.thick.shape[1] % patch.fold == patch.thick.shape[2] % patch.fold == 0
    assert patch.linear.shape == patch.target.shape
    assert patch.linear.shape[1:] == patch.thick.shape[1:]
    assert patch.below.min() >= 0
    assert patch.below.max() <= max(0, len(patch.thick) - 2)
    assert (patch.between >= 0).all()
    assert (patch.between <= 1).all()
    assert all(np.isfinite(image).all() for image in (patch.thick, patch.linear, patch.target))


@pytest.mark.parametrize("flips", [(0, 0, 0), (1, 0, 0), (0, 1, 1)])
def test_thick_slices_average_the_thin_ones_where_they_lie(flips: tuple[int, int, int]) -> None:
    """On a ramp along z, and along the rows, every slice says where it is: places and mirrors must agree with it."""
    z, _, x = np.meshgrid(np.arange(60.0), np.arange(64.0), np.arange(64.0), indexing="ij")
    source = Source("ramp", (10 * z + x).astype(np.int16), (1.0, 0.8, 0.8))
    scan = Scan(0.8, 1.0, (0.0, 0.0), BOX, 5.0, 0.3, BOX, flips=flips)
    patch = cut(source, scan, PatchSize(6, 5, 12), np.random.default_rng(0))
    between = patch.between[:, None, None]
    placed = patch.thick[patch.below] * (1 - between) + patch.thick[patch.below + 1] * between
    np.testing.assert_allclose(placed, patch.target, atol=0.6)


def test_levels_reach_the_network_once_and_contrasts_magnified() -> None:
    """Air and tissue differ by 1 in unit scale, tissues by 0.05: all but one channel must be blind to the level."""
    cells = torch.rand(1, 16, 5, 3, 3)
    seen, lifted = contrasts(cells), contrasts(cells + 0.5)
    torch.testing.assert_close(lifted[:, 1:], seen[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(lifted[:, :1], seen[:, :1] + 0.5)
    spread = (cells - cells.mean(1, keepdim=True)).std()
    assert float(seen[:, 1:17].std()) == pytest.approx(GAIN * float(spread), rel=1e-3)


def test_a_patch_can_be_learnt() -> None:
    torch.manual_seed(0)
    network, patch = PretrainedNetwork(NetworkConfig(16, 1, 8)), drawn([wedges()], [], RECIPE, 1, 0)
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    given = tensors(patch)
    for _ in range(60):
        optimiser.zero_grad()
        (100 * (forward(network, given, patch.fold, half=False) - given["target"]).square().mean()).backward()
        optimiser.step()
    assert held_out_gain(network, [("seen", patch)], half=False)["seen"] > 2.0


def test_resumed_training_gives_the_same_weights(tmp_path: Path) -> None:
    sources = [wedges()], []
    (tmp_path / "whole").mkdir(), (tmp_path / "parts").mkdir()

    def run(state: State, count: int) -> State:
        for _ in range(count):
            train_step(state, RECIPE, sources, 100, half=False)
        return state

    whole = run(begin(RECIPE, tmp_path / "whole", "cpu"), 4)
    keep(run(begin(RECIPE, tmp_path / "parts", "cpu"), 2), RECIPE, tmp_path / "parts")
    parts = run(begin(RECIPE, tmp_path / "parts", "cpu"), 2)
    assert parts.step == whole.step == 4
    for name, tensor in whole.average.state_dict().items():
        torch.testing.assert_close(parts.average.state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(SystemExit, match="another recipe"):
        begin(replace(RECIPE, width=4), tmp_path / "parts", "cpu")


def test_what_is_exported_is_loaded_by_its_card(tmp_path: Path) -> None:
    state = begin(RECIPE, tmp_path, "cpu")
    export(state, RECIPE, tmp_path / "m.safetensors", "mine", {"data": [{"name": "wedges"}]})
    model = load_pretrained(tmp_path / "m.safetensors")
    assert model.name == "mine"
    assert model.card.recipe["width"] == RECIPE.width
    assert model.card.network == RECIPE.network
    assert model.card.data == ({"name": "wedges"},)
    for name, tensor in model.network().state_dict().items():
        torch.testing.assert_close(tensor, state.average.state_dict()[name], rtol=2e-3, atol=1e-5)


def test_a_network_grown_in_width_and_depth_gives_the_same_and_learns_apart() -> None:
    torch.manual_seed(1)
    small, large = PretrainedNetwork(NetworkConfig(8, 1, 4)), PretrainedNetwork(NetworkConfig(16, 3, 12))
    torch.nn.init.normal_(small.leave.weight, std=0.1)
    grow(large, small)
    patch = drawn([wedges()], [], RECIPE, 0, 0)
    given = tensors(patch)
    wanted, found = (forward(network, given, patch.fold, half=False) for network in (small, large))
    assert float((wanted - given["linear"]).detach().std()) > 0.001
    torch.testing.assert_close(found, wanted)
    (found - given["target"]).square().mean().backward()
    assert all(float(block.conv2.weight.grad.abs().max()) > 0 for block in large.blocks)
    twins = large.enter.weight.grad[:8] - large.enter.weight.grad[8:]
    assert float(twins.abs().max()) > 1e-3 * float(large.enter.weight.grad.abs().max())
    with pytest.raises(SystemExit, match="widths"):
        grow(PretrainedNetwork(NetworkConfig(12, 3, 4)), small)


def test_the_rate_rises_stays_and_falls_to_nothing() -> None:
    recipe = Recipe(learning_rate=1.0, warmup_steps=10, cool_down=0.2)
    found = [rate(recipe, step, 1000) for step in (0, 9, 500, 800, 900, 999)]
    assert found == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.005])


def test_no_patch_has_the_depth_at_which_bfloat16_gradients_are_garbage() -> None:
    patches = [drawn([wedges()], [], RECIPE, step, 0) for step in range(20)]
    assert min(min(len(p.thick), len(p.target)) for p in patches) >= LEAST_DEPTH
    assert asdict(RECIPE)["thick"] >= LEAST_DEPTH
