"""The shipped refiner: nothing at first, exact in slabs, one set of weights for all pixels, and refused when torn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.engines import pin
from pipeline.forward_model import SliceProfile, slice_operator
from pipeline.metrics import psnr
from pipeline.phantom import PhantomSettings, make_patient
from pipeline.refiner import (
    NetworkConfig,
    PretrainedModel,
    PretrainedNetwork,
    RunSettings,
    as_cells,
    fold_of,
    linear_weights,
    load_pretrained,
    thin_slices,
    to_unit,
)
from pipeline.refiner.pretrained import PretrainedCard, flushed, outside, row_slabs, shipped_models
from pipeline.refiner.pretrained_input import HU_RANGE, from_unit
from pipeline.refiner.pretrained_network import FOLD, as_pixels
from pipeline.volume import Geometry, Volume

CONFIG = NetworkConfig(width=6, blocks=1, head=4)
PROFILE = SliceProfile("box", 5.0)
HELD_OUT_SEED = 910_001
LEAST_GAIN_DB = {"default": 0.5, "fast": 0.4}
"""Over back-projection, on a synthetic chest of pixels of 1.7 mm."""
EXACT = RunSettings(arithmetic="float32", threads=1)


def model(folder: Path, *, learnt: bool = True, seed: int = 0) -> PretrainedModel:
    """One as saved, whose last layer does something where it has learnt."""
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    network = PretrainedNetwork(CONFIG)
    if learnt:
        torch.nn.init.normal_(network.leave.weight, std=0.1)
    path = folder / "own.safetensors"
    save_file({name: t.half().contiguous() for name, t in network.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(card(path)))
    return load_pretrained(path)


def card(path: Path) -> dict[str, object]:
    import hashlib

    return {
        "name": "own",
        "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "network": {"width": 6, "blocks": 1, "head": 4},
        "trained_for": {
            "thickness_mm": [3, 7.5],
            "spacing_mm": [1.8, 7.5],
            "pixel_mm": [0.45, 2.2],
            "thin_spacing_mm": [0.6, 2.5],
        },
    }


def study(rows: int = 21, columns: int = 30, pixel: float = 0.8, count: int = 6) -> tuple[Volume, Geometry]:
    """Thick slices of noise, 5 mm apart, and the grid of 1 mm inside them; an odd matrix."""
    affine = ((0.0, 0.0, pixel, 0.0), (0.0, pixel, 0.0, 0.0), (5.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    at = Geometry((count, rows, columns), affine, tuple(5.0 * np.arange(count)), 5.0)
    hu = np.random.default_rng(0).integers(-900, 600, at.shape_zyx).astype(np.int16)
    return Volume(hu, at), at.thin_grid(1.0)


def test_an_untrained_model_gives_the_linear_estimate(tmp_path: Path) -> None:
    thick, target = study()
    found = thin_slices(model(tmp_path, learnt=False), thick, target, PROFILE, EXACT)
    z = np.asarray(thick.geometry.z_mm), np.asarray(target.z_mm)
    wanted = (linear_weights(PROFILE, *z) @ thick.hu.reshape(len(thick.hu), -1).astype(np.float32)).reshape(found.shape)
    np.testing.assert_allclose(found, np.clip(wanted, *HU_RANGE), atol=0.01)


@pytest.mark.parametrize("pixel", [0.8, 1.6])
def test_slabs_give_the_numbers_of_one_pass(tmp_path: Path, pixel: float) -> None:
    thick, target = study(rows=90, pixel=pixel)
    own = model(tmp_path)
    whole = thin_slices(own, thick, target, PROFILE, EXACT)
    slabs = list(row_slabs(thick.hu.shape, fold_of(pixel), CONFIG.reach, 1000))
    assert len(slabs) > 1
    told: list[float] = []
    parts = thin_slices(own, thick, target, PROFILE, replace(EXACT, max_cells=1000, on_progress=told.append))
    np.testing.assert_allclose(parts, whole, atol=0.02)
    assert np.ptp(whole - thin_slices(model(tmp_path, learnt=False), thick, target, PROFILE, EXACT)) > 10
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 300), st.sampled_from([2, 4]), st.integers(1, 40_000))
def test_slabs_cover_every_row_once_with_their_halo(k: int, rows: int, columns: int, fold: int, cells: int) -> None:
    reach, seen = 5, np.zeros(rows, int)
    for wide, inner in row_slabs((k, rows, columns), fold, reach, cells):
        own = range(wide.start + inner.start, wide.start + inner.stop)
        seen[own.start : own.stop] += 1
        assert wide.start == max(0, own.start - reach * fold)
        assert wide.start % fold == 0
        assert wide.stop == rows or wide.stop >= own.stop + reach * fold
    assert (seen == 1).all()


def test_a_coarse_pixel_is_four_equal_fine_ones() -> None:
    coarse = torch.randn(1, 1, 3, 8, 12)
    fine = coarse.repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert torch.equal(as_cells(coarse, FOLD // 2), as_cells(fine, FOLD))
    torch.testing.assert_close(as_pixels(as_cells(coarse, FOLD // 2), FOLD // 2), coarse)
    torch.testing.assert_close(as_pixels(as_cells(fine, FOLD), FOLD), fine)


@given(st.lists(st.floats(-1024, 3071, width=32), min_size=1, max_size=20))
def test_the_unit_scale_loses_nothing_of_bone(values: list[float]) -> None:
    hu = np.asarray(values, np.float32)
    np.testing.assert_allclose(from_unit(to_unit(hu)), hu, atol=0.01)
    assert to_unit(np.asarray([3071.0]))[0] < 1.6
    assert to_unit(np.asarray([9000.0]))[0] == to_unit(np.asarray([3071.0]))[0]


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 5), st.sampled_from([0.7, 1.0, 2.5]))
def test_any_number_of_slices(count: int, spacing: float) -> None:
    torch.manual_seed(0)
    thick, _ = study(count=count)
    target = thick.geometry.thin_grid(spacing)
    features = PretrainedNetwork(CONFIG).encode(torch.zeros(1, 1, count, 8, 8), torch.zeros(1, 2))
    assert features.shape == (1, 6, count, 2, 2)
    assert target.shape_zyx[0] == round(5 * count / spacing)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    thick, target = study()
    own = model(tmp_path)
    exact = thin_slices(own, thick, target, PROFILE, EXACT)
    half = thin_slices(own, thick, target, PROFILE, replace(EXACT, arithmetic="bfloat16"))
    change = exact - thin_slices(model(tmp_path, learnt=False), thick, target, PROFILE, EXACT)
    assert float(np.sqrt(np.mean((half - exact) ** 2))) < 0.02 * float(np.sqrt(np.mean(change**2)))


def denormals(threads: int) -> int:
    """How many of four million products below the smallest normal number are not zero: on every thread of the pool."""
    torch.set_num_threads(threads)
    return int(torch.count_nonzero(torch.full((4_000_000,), 1e-30) * 1e-10))


def test_denormals_are_flushed_on_every_thread_even_after_torch_has_made_its_pool() -> None:
    before = torch.get_num_threads()
    torch.set_flush_denormal(False)
    try:
        assert denormals(2) == 4_000_000
        assert flushed(lambda: denormals(2), 2) == 0
        assert denormals(2) == 4_000_000
    finally:
        torch.set_num_threads(before)


def test_a_stage_leaves_the_callers_arithmetic_as_it_was() -> None:
    """A stage may run on its caller's own thread, whose denormals are none of its business."""
    before = torch.get_num_threads()
    try:
        pin(1)
        assert denormals(1) == 4_000_000
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("harm", ["unknown", "no card", "torn", "other network"])
def test_what_is_no_model_is_refused_with_a_remedy(tmp_path: Path, harm: str) -> None:
    own = Path(model(tmp_path).path)
    if harm == "unknown":
        own = tmp_path / "nothing"
    elif harm == "no card":
        own.with_suffix(".json").unlink()
    elif harm == "torn":
        own.write_bytes(own.read_bytes()[:-1] + b"x")
    else:
        raw = card(own) | {"network": {"width": 8, "blocks": 1, "head": 4}}
        own.with_suffix(".json").write_text(json.dumps(raw))
    with pytest.raises(InputError) as told:
        load_pretrained(own).network()
    assert told.value.remedy


def test_what_lies_outside_the_card_is_said(tmp_path: Path) -> None:
    known = model(tmp_path).card
    thick, target = study()
    assert outside(known, thick.geometry, target) == []
    wide = replace(thick.geometry, thickness_mm=10.0)
    assert outside(known, wide, thick.geometry.thin_grid(0.3)) == [
        "slice thickness 10 mm, trained for 3 to 7.5 mm",
        "wanted slice spacing 0.3 mm, trained for 0.6 to 2.5 mm",
    ]


def test_one_slice_or_another_matrix_is_refused(tmp_path: Path) -> None:
    thick, target = study()
    for shape in ((20, 4, 4), target.shape_zyx):
        one = Volume(thick.hu[:1], thick.geometry.with_z([0.0])) if shape == target.shape_zyx else thick
        with pytest.raises(InputError):
            thin_slices(model(tmp_path), one, replace(target, shape_zyx=shape), PROFILE, EXACT)


def test_a_card_needs_what_is_asked_of_it() -> None:
    with pytest.raises(KeyError):
        PretrainedCard.of({"name": "x"})


@pytest.mark.parametrize("name", ["default", "fast"])
def test_what_ships_is_small_has_a_card_and_beats_cubic_on_a_patient_it_never_saw(name: str) -> None:
    shipped = load_pretrained(name)
    assert Path(shipped.path).stat().st_size <= 6e6
    assert shipped.name == name
    assert all(row["sha256"] and row["licence"] and row["credit"] for row in shipped.card.data)
    assert not {row["name"] for row in shipped.card.data} & set(shipped.card.held_out["volumes"])
    patient = make_patient(HELD_OUT_SEED, 96, 60, "APE", PhantomSettings(field_of_view_mm=160.0))
    fine = np.asarray(patient.thin.geometry.z_mm)
    z = fine[2] + 5.0 * np.arange(11)
    profile = SliceProfile("box", 5.0, blur_mm=3.0)
    hu = np.rint(slice_operator(profile, z, fine).apply(patient.thin.hu)).astype(np.int16)
    thick = Volume(hu, replace(patient.thin.geometry.with_z(z), thickness_mm=5.0))
    inside = slice(2, 2 + 51)
    target = patient.thin.geometry.with_z(fine[inside])
    truth = np.clip(patient.thin.hu[inside], -1000, 1000)

    def decibels(found: NDArray[np.float32]) -> float:
        return psnr(np.clip(found, -1000, 1000), truth, data_range=2000)

    linear = linear_weights(profile, z, fine[inside]) @ hu.reshape(len(hu), -1).astype(np.float32)
    found = thin_slices(shipped, thick, target, profile, RunSettings(threads=1))
    assert decibels(found) > decibels(linear.reshape(truth.shape)) + LEAST_GAIN_DB[name]
    soft = (truth > 0) & (truth < 80)
    assert abs(float((found[soft] - truth[soft]).mean())) < 5


def test_the_models_of_the_package_are_listed_the_default_first() -> None:
    assert [m.name for m in shipped_models()] == ["default", "fast"]
