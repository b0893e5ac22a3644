"""Patches: the same batch whenever it is asked for, thick slices measured or simulated by operators that differ."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.forward_model import SliceProfile, apply, slice_operator, weights
from pipeline.refiner import PatchSettings, RefinerCase, RefinerPatches, cut_patch, held_out_operator, positions
from pipeline.refiner.inputs import ThickView
from pipeline.refiner.patches import draw_operator, shown_slices
from pipeline.volume import Geometry, Volume, Window, resample_z

WINDOW = Window(40, 400)
THIN_Z = np.arange(40.0)


def case(name: str = "s", detail: bool = False, side: int = 24) -> RefinerCase:
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    at = Geometry((40, side, side), affine, tuple(THIN_Z), 1.0)
    thick_at = at.with_z(2.0 + 5.0 * np.arange(8), thickness_mm=5.0)
    rng = np.random.default_rng(abs(hash(name)) % 1000)
    thin = rng.integers(-150, 230, at.shape_zyx).astype(np.int16)
    thick = slice_operator(SliceProfile("box", 5.0), np.asarray(thick_at.z_mm), THIN_Z).apply(thin)
    added = np.full(thin.shape, 8, np.float16) if detail else None
    return RefinerCase(name, Volume(thin, at), Volume(np.rint(thick).astype(np.int16), thick_at), added)


def patches(keys: list[str], loads: list[str] | None = None, **options: int) -> RefinerPatches:
    def load(key: str) -> RefinerCase:
        if loads is not None:
            loads.append(key)
        return case(key)

    cutting = PatchSettings(patch_zyx=(8, 12, 12), batch=3, patches_per_pair=6, held=2, **options)
    return RefinerPatches(keys, load, WINDOW, cutting)


def test_a_batch_is_the_same_whenever_it_is_asked_for() -> None:
    first, again, other = patches(list("abcd")), patches(list("dcba")), patches(list("abcd"), seed=1)
    assert len(first) == 2 * 4
    wanted = [(0, 5), (1, 0), (0, 2)]
    for one in wanted:
        ours, theirs = first.batch(*one), again.batch(*one)
        for one_part, other_part in zip(ours["inputs"], theirs["inputs"], strict=True):
            np.testing.assert_array_equal(one_part, other_part)
        assert ours["study_key"] == theirs["study_key"]
        assert ours["inputs"].fine.shape == (3, 3, 8, 12, 12)
        assert ours["inputs"].thick.shape[:2] == (3, 2)
        assert ours["inputs"].thick.shape[2] in (4, 5)
        assert ours["inputs"].below.shape == ours["inputs"].between.shape == (3, 8)
        assert ours["target"].shape == (3, 1, 8, 12, 12)
    assert not np.array_equal(first.batch(0, 2)["inputs"].fine, other.batch(0, 2)["inputs"].fine)


def test_an_epoch_reads_every_pair_once_and_holds_few() -> None:
    loads: list[str] = []
    stream = patches(list("abcde"), loads)
    seen = {key for i in range(len(stream)) for key in stream.batch(0, i)["study_key"]}
    assert seen == set("abcde")
    assert sorted(loads) == list("abcde")


@given(seed=st.integers(0, 2**32), spacing=st.floats(2, 6), phase=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_operators_stay_on_the_thin_grid(seed: int, spacing: float, phase: float) -> None:
    at = positions(THIN_Z, spacing, phase)
    assert len(at) >= 5
    assert at[0] - spacing / 2 >= -0.5 - 1e-9
    assert at[-1] + spacing / 2 <= 39.5 + 1e-6
    profile, thick_z = draw_operator(np.random.default_rng(seed), THIN_Z, 5.0)
    assert profile.kind in ("box", "gaussian")
    apart = np.diff(thick_z).min()
    assert 3.0 - 1e-9 <= apart <= 5.0 + 1e-9
    assert apart - 1e-9 <= profile.fwhm_mm <= (5.0 if profile.kind == "box" else 6.7) + 1e-9
    assert profile.blur_mm == 0, "the blurred box is held out"


@pytest.mark.parametrize("spacing", [3.0, 4.0, 5.0])
def test_closer_slices_are_all_shown(spacing: float) -> None:
    one = case()
    box = (slice(12, 28), slice(0, 24), slice(0, 24))
    operator = (SliceProfile("box", spacing), positions(THIN_Z, spacing, 0.0))
    widest = shown_slices(one, box[0], (SliceProfile("box", 3.0), positions(THIN_Z, 3.0, 0.0)))
    for reach in (None, widest):
        inputs, _ = cut_patch(one, box, operator, WINDOW, reach=reach)
        # Clipped to the outermost slice shown, thin slices would share one place.
        np.testing.assert_allclose(np.diff(inputs.below + inputs.between), 1 / spacing, atol=1e-5)


def test_the_held_out_operator_is_no_other() -> None:
    profile, thick_z = held_out_operator(THIN_Z, 5.0)
    assert profile == SliceProfile("box", 5.0, blur_mm=3.0)
    np.testing.assert_allclose(np.diff(thick_z), 5.0)


def test_measured_slices_are_seen_as_composition_sees_them() -> None:
    one = case(detail=True)
    box = (slice(10, 18), slice(2, 12), slice(3, 13))
    inputs, target = cut_patch(one, box, None, WINDOW)
    thick_z = np.asarray(one.thick.geometry.z_mm)
    base = resample_z(one.thick.hu, thick_z, THIN_Z, "cubic")
    base = np.clip(base, one.thick.hu.min(axis=0), one.thick.hu.max(axis=0))
    linear = apply(weights("cubic_back_projection", thick_z, THIN_Z, SliceProfile("box", 5.0)), one.thick.hu)
    view = ThickView.of(thick_z, THIN_Z, SliceProfile("box", 5.0))
    composed = view.back_projected(one.thick.hu, np.asarray(base + 8, np.float32))
    np.testing.assert_allclose(inputs.fine[0], WINDOW.to_unit(linear)[box], atol=1e-5)
    np.testing.assert_allclose(inputs.fine[1], WINDOW.to_unit(composed)[box], atol=1e-3)
    np.testing.assert_allclose(inputs.fine[2][:, 0, 0], [0.4, 0.2, 0.0, 0.2, 0.4, 0.4, 0.2, 0.0], atol=1e-6)
    assert np.ptp(inputs.fine[2], axis=(1, 2)).max() == 0
    # Slices 10 to 17 span thick slices 1 (at 7) to 4 (at 22): 2 by length, and 2 beside them.
    np.testing.assert_allclose(inputs.thick[0], WINDOW.to_unit(one.thick.hu[1:5, 2:12, 3:13].astype(np.float32)))
    np.testing.assert_allclose(inputs.below + inputs.between, (np.arange(10, 18) - 2) / 5 - 1, atol=1e-6)
    np.testing.assert_array_equal(target[0], WINDOW.to_unit(one.thin.hu)[box])


def test_a_simulation_with_the_true_operator_gives_the_measured_slices() -> None:
    one = case()
    box = (slice(0, 40), slice(0, 24), slice(0, 24))
    thick_z = np.asarray(one.thick.geometry.z_mm)
    measured, _ = cut_patch(one, box, None, WINDOW)
    simulated, _ = cut_patch(one, box, (SliceProfile("box", 5.0), thick_z), WINDOW)
    np.testing.assert_allclose(measured.fine, simulated.fine, atol=2 / 400 * 3)
    np.testing.assert_array_equal(measured.below, simulated.below)
    wider, _ = cut_patch(one, box, (SliceProfile("gaussian", 6.7), thick_z), WINDOW)
    assert wider.thick[0].std() < 0.95 * simulated.thick[0].std()
    assert wider.thick[1].max() > 1.2 * simulated.thick[1].max()


def test_what_composition_believes_changes_what_is_back_projected_alone() -> None:
    one = case()
    box = (slice(0, 40), slice(0, 24), slice(0, 24))
    operator = (SliceProfile("gaussian", 6.7), np.asarray(one.thick.geometry.z_mm))
    fitted, target = cut_patch(one, box, operator, WINDOW)
    stated, same = cut_patch(one, box, operator, WINDOW, told=SliceProfile("box", 5.0))
    np.testing.assert_array_equal(fitted.thick[0], stated.thick[0])
    np.testing.assert_array_equal(target, same)
    assert fitted.fine[0].std() > 1.02 * stated.fine[0].std(), "a wider profile is undone further"


def test_flips_turn_inputs_and_target_alike() -> None:
    one = case()
    box = (slice(4, 12), slice(0, 8), slice(0, 10))
    inputs, target = cut_patch(one, box, None, WINDOW)
    flipped, turned = cut_patch(one, box, None, WINDOW, flips=(1, 0, 1))
    np.testing.assert_array_equal(flipped.fine, inputs.fine[:, ::-1, :, ::-1])
    np.testing.assert_array_equal(flipped.thick, inputs.thick[:, ::-1, :, ::-1])
    last = inputs.thick.shape[1] - 1
    np.testing.assert_allclose(flipped.below + flipped.between, last - (inputs.below + inputs.between)[::-1], atol=1e-6)
    np.testing.assert_array_equal(turned, target[:, ::-1, :, ::-1])


def test_transposed_patches_are_transposed_as_a_whole() -> None:
    stream = patches(["a"])
    whole = case("a").thin.hu
    turned = 0
    for index in range(len(stream)):
        cut = stream.batch(0, index)
        for target, fine in zip(cut["target"][:, 0], cut["inputs"].fine, strict=True):
            found = [
                holds(WINDOW.to_unit(whole.astype(np.float32)), np.flip(image, axes))
                for image in (target, target.swapaxes(1, 2))
                for axes in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in range(4))
            ]
            assert any(found)
            turned += not any(found[:8])
            assert np.corrcoef(fine[1].ravel(), target.ravel())[0, 1] > 0.2, "inputs turned likewise"
    assert 0 < turned < len(stream) * 3


def holds(volume: NDArray[np.float32], patch: NDArray[np.float32]) -> bool:
    """Whether the patch stands somewhere in the volume, by its first voxels and then as a whole."""
    for z, y, x in np.argwhere(volume == patch[0, 0, 0]):
        place = volume[z : z + patch.shape[0], y : y + patch.shape[1], x : x + patch.shape[2]]
        if place.shape == patch.shape and np.array_equal(place, patch):
            return True
    return False


def test_small_volumes_give_smaller_patches() -> None:
    small = RefinerPatches(["a"], lambda key: case(key, side=9), WINDOW, PatchSettings((16, 12, 12), batch=2))
    assert small.batch(0, 0)["inputs"].fine.shape == (2, 3, 16, 9, 9)


def test_no_pair_is_said() -> None:
    with pytest.raises(InputError, match="no pair to train on"):
        patches([])
