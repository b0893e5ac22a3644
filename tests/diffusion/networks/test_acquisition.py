"""What a model is told: where the thick slices lie, by protocol, in mm; and that `classic` is told nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.config import DataConfig
from diffusion.config.load import train_preset
from diffusion.data import PairStream, make_store
from diffusion.networks import MODEL_PRESETS, ThickSlices, UNet, UNetConfig, build_unet, parameter_count, told_tensor
from diffusion.networks.acquisition import ABOVE, BELOW, POSITION, PROFILE, SPACING, THICKNESS
from diffusion.networks.blocks import DepthAttention
from diffusion.objectives import build_objective
from diffusion.sampling import Interpolator, generate_for
from latentcache import InputError

SMALL = UNetConfig(
    width=8, multipliers=(1, 2), blocks_per_level=1, attention_levels=(1,), heads=2, time_embedding=16, groups=4,
    told=True,
)  # fmt: skip


def lively(config: UNetConfig = SMALL) -> UNet:
    """A network whose zero-initialised layers say something."""
    torch.manual_seed(0)
    network = build_unet(config)
    for parameter in network.parameters():
        if float(parameter.detach().abs().max()) == 0:
            torch.nn.init.normal_(parameter, std=0.3)
    network.eval()
    return network


def test_distances_lead_from_each_latent_slice_to_its_two_thick_neighbours() -> None:
    thick = ThickSlices(z0_mm=2.0, spacing_mm=5.0, count=4, thickness_mm=0.0)
    told = thick.seen_from([1.5, 5.5, 7.0, 9.5, 19.0])
    assert told[BELOW].tolist() == pytest.approx([-0.5, 3.5, 0.0, 2.5, 7.0]), "beyond the ends: of the outermost pair"
    assert told[ABOVE].tolist() == pytest.approx([5.5, 1.5, 5.0, 2.5, -2.0])
    assert told[POSITION].tolist() == pytest.approx([0.0, 4.0, 5.5, 8.0, 17.5])
    assert {float(v) for row in (SPACING, THICKNESS, PROFILE) for v in told[row]} == {5.0}, "no thickness: the spacing"
    assert replace(thick, thickness_mm=6.0, profile_mm=6.2).seen_from([0.0])[[THICKNESS, PROFILE], 0].tolist() == (
        pytest.approx([6.0, 6.2])
    )


def test_batches_say_what_each_window_needs(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", depths=(12,))
    data = DataConfig(window=4, windows_per_volume=2, batch_size=2, readers=1)
    batch = next(PairStream(store, data, told=True).fixed_batches())
    thick = next(s for s in store.series() if s.role == "thick")
    where = ThickSlices(thick.z_mm[0], thick.spacing_mm_zyx[0], thick.n_slices, thick.thickness_mm)
    for told, z_mm in zip(batch["told"], batch["z_mm"], strict=True):
        assert np.array_equal(told.numpy(), where.seen_from(z_mm.numpy()))
    assert "told" not in next(PairStream(store, data).fixed_batches())


@pytest.mark.parametrize("row", [BELOW, ABOVE, SPACING, THICKNESS, PROFILE, POSITION])
def test_everything_told_is_listened_to(row: int) -> None:
    network, x, t = lively(), torch.randn(1, 8, 6, 8, 8), torch.ones(1)
    told = told_tensor(ThickSlices(0.0, 5.0, 6, 5.0), 4.0 * np.arange(6))
    other = told.clone()
    other[:, row] *= 1.5
    with torch.no_grad():
        assert not torch.allclose(network(x, t, told), network(x, t, other), atol=1e-5)


def test_attention_sees_distances_and_no_absolute_place() -> None:
    torch.manual_seed(0)
    attention = DepthAttention(16, 4, 2, positions=True)
    torch.nn.init.normal_(attention.out.weight)
    x, z = torch.randn(2, 16, 6, 2, 3), 4.0 * torch.arange(6.0).repeat(2, 1)
    with torch.no_grad():
        here, moved, stretched, none = (attention(x, at) for at in (z, z + 300.0, 1.25 * z, None))
        alone = attention(x[1:], z[1:])
    assert torch.allclose(here, moved, atol=1e-4)
    assert not torch.allclose(here, stretched, atol=1e-3)
    assert not torch.allclose(here, none, atol=1e-3)
    assert torch.allclose(here[1:], alone, atol=1e-5), "each of a batch by its own positions"


def test_positions_of_neighbours_in_a_batch_do_not_mix() -> None:
    network, x = lively(), torch.randn(2, 8, 6, 8, 8)
    told = torch.cat([told_tensor(ThickSlices(0.0, s, 6, s), 4.0 * np.arange(6)) for s in (5.0, 3.0)])
    with torch.no_grad():
        both = network(x, torch.ones(2), told)
        assert torch.allclose(both[1:], network(x[1:], torch.ones(1), told[1:]), atol=1e-3)


def test_windows_are_told_of_their_own_slices() -> None:
    """Two windows that do not overlap give what each gives alone."""
    model = Interpolator.from_parts(lively(), build_objective("bridge"), [0.0] * 4, [1.0] * 4)
    condition, z = torch.randn(4, 8, 8, 8), 4.0 * np.arange(8)
    thick = ThickSlices(0.0, 5.0, 8, 5.0)
    whole = model.generate_latent(condition, depth_window=4, overlap=0, thick=thick, z_mm=z)
    last = model.generate_latent(condition[:, 4:], thick=thick, z_mm=z[4:])
    assert np.allclose(whole[:, 4:], last, atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"thick": ThickSlices(0.0, 5.0, 8, 5.0), "z_mm": [0.0, 4.0]}])
def test_a_model_that_is_not_told_refuses(more: dict[str, object]) -> None:
    model = Interpolator.from_parts(lively(), build_objective("bridge"), [0.0] * 4, [1.0] * 4)
    with pytest.raises(InputError, match="told where the thick slices lie"):
        model.generate_latent(torch.randn(4, 8, 8, 8), **more)  # type: ignore[arg-type]


def test_sampling_from_a_store_tells_what_training_told(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", splits=("train",), depths=(8,))
    stream = PairStream(store, DataConfig(readers=1), told=True)
    network, (pair,) = lively(), store.pairs()
    batch = next(stream.fixed_batches())
    mean, std = stream.mean.tolist(), stream.std.tolist()
    model = Interpolator.from_parts(
        network, build_objective("bridge", residual_std=1.0), mean, std, encode_key=stream.encode_key
    )
    with torch.no_grad():
        y = network(
            torch.cat([torch.zeros_like(batch["condition"]), batch["condition"]], 1), torch.ones(1), batch["told"]
        )
    expected = (batch["condition"] + y)[0].numpy() * stream.std[:, None, None, None] + stream.mean[:, None, None, None]
    assert np.allclose(generate_for(store, model, pair), expected, atol=1e-4)


def test_classic_has_its_eight_channels_and_is_told_nothing() -> None:
    classic = train_preset("classic").model
    assert not classic.told
    network = build_unet(replace(classic, width=8, groups=4, heads=2, time_embedding=16))
    assert network.conv_in.in_channels == 8 * classic.latent_patch**2
    assert network.protocol is None
    assert not any(len(m.wave_numbers) for m in network.modules() if isinstance(m, DepthAttention))
    assert train_preset("classic").losses.measure == "latent"


def test_medium_has_599_million_parameters() -> None:
    assert MODEL_PRESETS["medium"].told
    assert parameter_count(MODEL_PRESETS["medium"]) == pytest.approx(599e6, rel=0.01)
