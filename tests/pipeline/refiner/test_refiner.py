"""The refiner: nothing at first, exact in tiles, only inside the window, and refused where it does not belong."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.decode import ComposeSettings, compose
from pipeline.forward_model import SliceProfile, ThickMeasurement, slice_operator
from pipeline.refiner import (
    Refiner,
    RefinerCard,
    RefinerConfig,
    RefinerFile,
    RunSettings,
    check_window,
    load_pretrained,
    refine,
    refined_volume,
    save_refiner,
    thin_slices,
)
from pipeline.refiner.inputs import RefinerInput, ThickView, neighbours
from pipeline.refiner.network import folded, unfolded
from pipeline.refiner.refiner import settle, tiles, with_halo
from pipeline.volume import Geometry, Volume, Window, z_weights
from pipeline.workflows import own_refiner

WINDOW = Window(40, 400)
CONFIG = RefinerConfig(width=4, blocks=1)
PROFILE = SliceProfile("box", 5.0)


def network(seed: int = 0) -> Refiner:
    """One whose last layer does something."""
    torch.manual_seed(seed)
    made = Refiner(CONFIG)
    torch.nn.init.normal_(made.leave.weight, std=0.1)
    return made


def saved(made: Refiner, folder: Path, detail: str = "none") -> RefinerFile:
    return save_refiner(made, RefinerCard(CONFIG, (40.0, 400.0), (0.9, 1.1), detail), folder / "refiner.safetensors")


def scene(shape: tuple[int, int, int] = (20, 13, 17)) -> tuple[Volume, Geometry, NDArray[np.float32]]:
    """Thick slices, the thin lattice, and composed HU on it; an odd matrix, so that the last fold is half empty."""
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    target = Geometry(shape, affine, tuple(np.arange(float(shape[0]))), 1.0)
    at = target.with_z(2.0 + 5.0 * np.arange(shape[0] // 5), thickness_mm=5.0)
    rng = np.random.default_rng(0)
    thick = Volume(rng.integers(-900, 600, at.shape_zyx).astype(np.int16), at)
    return thick, target, rng.uniform(-900, 600, shape).astype(np.float32)


def refined(file: RefinerFile, composed: NDArray[np.float32], **options: int) -> float:
    thick, target, _ = scene()
    return refine(file, composed, seen(thick, target), WINDOW, "residual", **options)


def seen(thick: Volume, target: Geometry, profile: SliceProfile | None = PROFILE) -> ThickMeasurement:
    return ThickMeasurement.of(thick, target.z_mm, profile, 4.0)


def view_of(thick: Volume, target: Geometry) -> ThickView:
    return ThickView.of(np.asarray(thick.geometry.z_mm), np.asarray(target.z_mm), PROFILE)


def passed(made: Refiner, given: RefinerInput) -> NDArray[np.float32]:
    with torch.no_grad():
        out: NDArray[np.float32] = made(*(torch.from_numpy(part)[None] for part in given))[0, 0].numpy()
    return out


def test_untrained_it_back_projects(tmp_path: Path) -> None:
    thick, target, composed = scene()
    smooth = np.clip(composed / 10, -100, 200).astype(np.float32)
    measured = Volume(
        slice_operator(PROFILE, np.asarray(thick.geometry.z_mm), np.asarray(target.z_mm)).apply(smooth), thick.geometry
    )
    before = smooth + 20
    expected = view_of(thick, target).back_projected(measured.hu, before)
    change = refine(saved(Refiner(CONFIG), tmp_path), before, seen(measured, target), WINDOW, "residual")
    assert change == pytest.approx(20, abs=2)
    inside = (before > WINDOW.lower) & (before < WINDOW.upper)
    np.testing.assert_allclose(before[inside], expected[inside], atol=1e-2)


@pytest.mark.parametrize(("tile", "slices"), [(8, 7), (3, 32), (64, 1)])
def test_tiles_give_the_numbers_of_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int, slices: int
) -> None:
    file = saved(network(), tmp_path)
    thick, target, composed = scene()
    whole, tiled = composed.copy(), composed.copy()
    change = refined(file, whole, tile=64)
    monkeypatch.setattr("pipeline.refiner.refiner.SLICES", slices)
    refined(file, tiled, tile=tile)
    np.testing.assert_allclose(tiled, whole, atol=2e-3)
    assert change == pytest.approx(float(np.sqrt(np.mean((whole - composed) ** 2))), rel=1e-3)
    assert change > 1
    direct = passed(network(), view_of(thick, target).inputs(thick.hu, composed, WINDOW)).clip(-1, 1)
    inside = (composed > WINDOW.lower) & (composed < WINDOW.upper)
    np.testing.assert_allclose(WINDOW.to_unit(whole)[inside], direct[inside], atol=1e-5)


def test_what_the_window_hides_is_left_alone(tmp_path: Path) -> None:
    made = network()
    torch.nn.init.zeros_(made.leave.weight)
    assert made.leave.bias is not None
    torch.nn.init.constant_(made.leave.bias, -0.5)
    thick, target, composed = scene()
    before = composed.copy()
    expected = np.clip(view_of(thick, target).back_projected(thick.hu, composed), WINDOW.lower, WINDOW.upper) - 100
    refined(saved(made, tmp_path), composed)
    beyond = (before <= WINDOW.lower) & (expected <= WINDOW.lower)
    assert beyond.sum() > 50
    np.testing.assert_array_equal(composed[beyond], before[beyond])
    inside = (before > WINDOW.lower) & (before < WINDOW.upper)
    np.testing.assert_allclose(composed[inside], np.maximum(expected, WINDOW.lower)[inside], atol=0.01)


@given(height=st.integers(1, 9), width=st.integers(1, 9), fold=st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_folds_come_apart_as_they_were_put_together(height: int, width: int, fold: int) -> None:
    x = torch.arange(2 * 3 * height * fold * width * fold, dtype=torch.float32)
    x = x.reshape(1, 2, 3, height * fold, width * fold)
    cells = folded(x, fold)
    assert cells.shape == (1, 2 * fold**2, 3, height, width)
    assert torch.equal(unfolded(cells, fold), x)


def test_the_phase_says_where_a_thick_slice_lies() -> None:
    view = ThickView.of(np.array([2.0, 7.0, 12.0]), np.arange(15.0), PROFILE)
    np.testing.assert_allclose(view.phase[:8], [0.4, 0.2, 0.0, 0.2, 0.4, 0.4, 0.2, 0.0], atol=1e-6)
    operator = slice_operator(PROFILE, np.array([2.0, 7.0, 12.0]), np.arange(15.0))
    thick = np.random.default_rng(0).normal(size=(3, 4))
    assert np.abs(operator.matrix @ view.linear @ thick - thick).max() < 0.1, "the linear estimate agrees with y"
    cubic = z_weights(np.array([2.0, 7.0, 12.0]), np.arange(15.0), "cubic").astype(np.float32) @ thick
    composed = cubic[:, :, None].astype(np.float32)
    np.testing.assert_allclose(view.back_projected(thick[:, :, None], composed)[..., 0], view.linear @ thick, atol=1e-4)


def test_neighbours_beyond_the_ends_are_the_outermost() -> None:
    view = ThickView.of(np.array([2.0, 7.0, 12.0]), np.arange(15.0), PROFILE)
    below, between = neighbours(view.place, 3)
    np.testing.assert_array_equal(below, [0] * 7 + [1] * 8)
    np.testing.assert_allclose(between, [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1], atol=1e-6)
    assert view.width == pytest.approx(1 / np.sqrt(12))
    assert SliceProfile("box", 5.0, blur_mm=3.0).standard_deviation_mm == pytest.approx(
        np.hypot(5 / 12**0.5, 3 / 2.3548), 1e-3
    )
    triangle = SliceProfile.measured([-5.0, 0.0, 5.0], [0.0, 1.0, 0.0])
    assert triangle.standard_deviation_mm == pytest.approx(5 / np.sqrt(6), rel=1e-4)


def test_every_thin_slice_sees_its_own_neighbours() -> None:
    """Features that are each thick slice's number come out as the number of the place, where the matrices say so."""
    made = Refiner(RefinerConfig(width=1, blocks=0, fold=1))
    torch.nn.init.zeros_(made.mix.weight)
    assert made.mix.bias is not None
    torch.nn.init.zeros_(made.mix.bias)
    with torch.no_grad():
        # below x 1, below x -between, above x between: linear interpolation.
        made.mix.weight[:, 0, 0, 0, 0] = torch.tensor([1.0, -1.0, 0.0, 0.0, 1.0, 0.0])
    numbers = torch.arange(4.0).reshape(1, 1, 4, 1, 1).expand(1, 1, 4, 2, 3)
    places = np.array([0.0, 0.3, 1.0, 1.75, 2.5, 3.0], np.float32)
    below, between = (torch.from_numpy(part)[None] for part in neighbours(places, 4))
    mixed = made._mixed(numbers, below, between)
    np.testing.assert_allclose(mixed[0, 0, :, 1, 2].detach().numpy(), places, atol=1e-6)


@given(composed=st.floats(-1024, 3000), start=st.floats(-160, 230))
@settings(max_examples=100, deadline=None)
def test_no_step_in_the_refined_value(composed: float, start: float) -> None:
    refined = (start + np.linspace(0, 10, 101)).astype(np.float32)
    out = settle(refined, np.full_like(refined, composed), WINDOW)
    if WINDOW.lower <= composed <= WINDOW.upper:
        np.testing.assert_array_equal(out, refined)
    if composed < WINDOW.lower - 100:
        assert np.diff(out).min() > -1e-2, "monotone"
        assert np.abs(np.diff(out)).max() < 1.5, "0.1 HU in; no steeper than a hand-over over its margin"


@given(shape=st.tuples(*[st.integers(1, 9)] * 3), tile=st.tuples(*[st.integers(1, 5)] * 3), halo=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_tiles_cover_every_voxel_once(shape: tuple[int, ...], tile: tuple[int, ...], halo: int) -> None:
    seen = np.zeros(shape, int)
    index = np.arange(seen.size).reshape(shape)
    for box in tiles(shape, tile):
        seen[box] += 1
        wide, inner = with_halo(box, shape, (halo, 0, halo))
        np.testing.assert_array_equal(index[wide][inner], index[box])
    assert (seen == 1).all()


def test_the_hash_covers_weights_and_card(tmp_path: Path) -> None:
    files = [
        saved(network(0), tmp_path / "a"),
        saved(network(1), tmp_path / "b"),
        saved(network(0), tmp_path / "c", detail="residual"),
        saved(network(0), tmp_path / "d"),
    ]
    for one, other in itertools.combinations(range(3), 2):
        assert files[one].sha256 != files[other].sha256
    assert files[0].sha256 == files[3].sha256 == RefinerFile.of(tmp_path / "a").sha256


def test_compose_refines_before_it_projects(tmp_path: Path) -> None:
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    target = Geometry((20, 16, 16), affine, tuple(np.arange(20.0)), 1.0)
    thick_at = target.with_z([2.0, 7.0, 12.0, 17.0], thickness_mm=5.0)
    rng = np.random.default_rng(0)
    thick = Volume(rng.integers(-100, 150, (4, 16, 16)).astype(np.int16), thick_at)
    decoded = rng.uniform(-100, 150, (20, 16, 16)).astype(np.float32)
    file = saved(network(), tmp_path)
    plain, without = compose(decoded, WINDOW, seen(thick, target, None), ComposeSettings(consistency=False))
    how = ComposeSettings(consistency=False, refiner=file)
    refined, figures = compose(decoded, WINDOW, seen(thick, target, None), how)
    assert "refiner_sha256" not in without
    assert figures["refiner_sha256"] == file.sha256
    rms = float(np.sqrt(np.mean((refined.astype(float) - plain) ** 2)))
    assert figures["refiner_change_hu"] == pytest.approx(rms, rel=0.02)
    _, projected = compose(decoded, WINDOW, seen(thick, target, None), ComposeSettings(refiner=file))
    assert projected["rms_after_hu"] < projected["rms_before_hu"]


def test_one_that_nobody_named_is_left_out_where_it_does_not_belong(tmp_path: Path) -> None:
    file = replace(saved(network(), tmp_path), optional=True)
    thick, target, composed = scene()
    how = ComposeSettings(consistency=False, refiner=file)
    _, fits = compose(composed, WINDOW, seen(thick, target, None), how)
    assert fits["refiner_sha256"] == file.sha256
    _, figures = compose(composed, Window(0, 2000), seen(thick, target), how)
    assert "for the window 40:400" in figures["refiner_left_out"]
    with pytest.raises(InputError, match="for the window"):
        compose(composed, Window(0, 2000), seen(thick, target), replace(how, refiner=replace(file, optional=False)))


def test_a_refiner_of_earlier_weights_is_not_the_checkpoints_own(tmp_path: Path) -> None:
    made = network()
    card = RefinerCard(CONFIG, (40.0, 400.0), (0.9, 1.1), "residual", {"checkpoint_sha256": "a" * 64})
    file = save_refiner(made, card, tmp_path / "refiner.safetensors")
    own = own_refiner(tmp_path, "a" * 64, "cpu")
    assert (own.sha256, own.optional) == (file.sha256, True)
    assert own_refiner(tmp_path, "b" * 64, "cpu") is None
    assert own_refiner(tmp_path / "elsewhere", "a" * 64, "cpu") is None


def test_where_it_does_not_belong_it_is_refused(tmp_path: Path) -> None:
    file = saved(network(), tmp_path, detail="residual")
    thick, target, composed = scene()
    coarse = target.with_z(2.5 * np.arange(20))
    for window, at, detail, said in (
        (Window(0, 2000), target, "residual", "for the window 40:400"),
        (WINDOW, coarse, "residual", "2.5 mm apart"),
        (WINDOW, target, "absolute", "detail absolute"),
    ):
        with pytest.raises(InputError, match=said):
            refine(file, composed, seen(thick, at), window, detail)
    (tmp_path / "other.safetensors").write_bytes(b"no tensors")
    with pytest.raises(InputError, match="holds no refiner"):
        RefinerFile.of(tmp_path / "other.safetensors").load()
    with pytest.raises(InputError, match=r"no refiner.safetensors"):
        RefinerFile.of(tmp_path / "nowhere")
    with pytest.raises(InputError, match="width 0"):
        RefinerConfig(width=0)


def test_a_shipped_model_refines_by_the_stated_profile_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    thick, target, _ = scene((20, 12, 16))
    file = RefinerFile.of("fast")
    model = load_pretrained("fast")
    assert (file.sha256, file.pretrained) == (model.sha256, model)
    with caplog.at_level("WARNING", "ctpipe.refiner"):
        hu = refined_volume(file, thick, np.asarray(target.z_mm), WINDOW)
    wanted = thin_slices(model, thick, target, PROFILE, RunSettings(arithmetic="float32"))
    assert np.array_equal(hu, wanted)
    assert not caplog.records, "such slices are within its card"
    check_window(file, Window(-600, 1500))  # any: its scale has all of HU
    apart = Volume(thick.hu, replace(thick.geometry.with_z(12.0 * np.arange(4.0)), thickness_mm=12.0))
    with caplog.at_level("WARNING", "ctpipe.refiner"):
        refined_volume(file, apart, np.arange(36.0), WINDOW)
    assert "slice thickness 12 mm, trained for 3 to 7.5 mm" in caplog.text


def test_a_name_that_no_model_bears_is_no_refiner() -> None:
    with pytest.raises(InputError, match=r"the name of a model that `ctpipe models` lists"):
        RefinerFile.of("slow")
