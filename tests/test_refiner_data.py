"""Patches: the same batch whenever it is asked for, thick slices measured or simulated by operators that differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache.errors import InputError
from pipeline.baselines import apply, weights
from pipeline.geometry import Geometry
from pipeline.hu import Window
from pipeline.refiner_data import (
    PatchSettings,
    RefinerCase,
    RefinerPatches,
    cut_patch,
    draw_operator,
    held_out_operator,
    positions,
)
from pipeline.resample import resample_z
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.volume import Volume

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
        np.testing.assert_array_equal(ours["inputs"], theirs["inputs"])
        assert ours["study_key"] == theirs["study_key"]
        assert ours["inputs"].shape == (3, 3, 8, 12, 12)
        assert ours["target"].shape == (3, 1, 8, 12, 12)
    assert not np.array_equal(first.batch(0, 2)["inputs"], other.batch(0, 2)["inputs"])


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
    assert 5.0 <= profile.fwhm_mm <= 6.7 + 1e-9
    assert profile.blur_mm == 0, "the blurred box is held out"
    assert 3.0 - 1e-9 <= np.diff(thick_z).min() <= 5.0 + 1e-9


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
    np.testing.assert_allclose(inputs[0], WINDOW.to_unit(linear)[box], atol=1e-5)
    np.testing.assert_allclose(inputs[1], WINDOW.to_unit(base + 8)[box], atol=1e-3)
    np.testing.assert_allclose(inputs[2][:, 0, 0], [0.4, 0.2, 0.0, 0.2, 0.4, 0.4, 0.2, 0.0], atol=1e-6)
    assert np.ptp(inputs[2], axis=(1, 2)).max() == 0
    np.testing.assert_array_equal(target[0], WINDOW.to_unit(one.thin.hu)[box])


def test_a_simulation_with_the_true_operator_gives_the_measured_slices() -> None:
    one = case()
    box = (slice(0, 40), slice(0, 24), slice(0, 24))
    thick_z = np.asarray(one.thick.geometry.z_mm)
    measured, _ = cut_patch(one, box, None, WINDOW)
    simulated, _ = cut_patch(one, box, (SliceProfile("box", 5.0), thick_z), WINDOW)
    np.testing.assert_allclose(measured, simulated, atol=2 / 400 * 3)
    wider, _ = cut_patch(one, box, (SliceProfile("gaussian", 6.7), thick_z), WINDOW)
    assert wider[1].std() < 0.95 * simulated[1].std()


def test_what_composition_believes_changes_the_linear_estimate_alone() -> None:
    one = case()
    box = (slice(0, 40), slice(0, 24), slice(0, 24))
    operator = (SliceProfile("gaussian", 6.7), np.asarray(one.thick.geometry.z_mm))
    fitted, target = cut_patch(one, box, operator, WINDOW)
    stated, same = cut_patch(one, box, operator, WINDOW, told=SliceProfile("box", 5.0))
    np.testing.assert_array_equal(fitted[1:], stated[1:])
    np.testing.assert_array_equal(target, same)
    assert fitted[0].std() > 1.02 * stated[0].std(), "a wider profile is undone further"


def test_flips_turn_inputs_and_target_alike() -> None:
    one = case()
    box = (slice(4, 12), slice(0, 8), slice(0, 10))
    inputs, target = cut_patch(one, box, None, WINDOW)
    flipped, turned = cut_patch(one, box, None, WINDOW, flips=(1, 0, 1))
    np.testing.assert_array_equal(flipped, inputs[:, ::-1, :, ::-1])
    np.testing.assert_array_equal(turned, target[:, ::-1, :, ::-1])


def test_small_volumes_give_smaller_patches() -> None:
    small = RefinerPatches(["a"], lambda key: case(key, side=9), WINDOW, PatchSettings((16, 12, 12), batch=2))
    assert small.batch(0, 0)["inputs"].shape == (2, 3, 16, 9, 9)


def test_no_pair_is_said() -> None:
    with pytest.raises(InputError, match="no pair to train on"):
        patches([])
