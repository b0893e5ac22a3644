"""The alarm on plants that no thick slice shows."""

from __future__ import annotations

import numpy as np
import pytest

from latentcache import InputError
from pipeline.evaluation import auc
from pipeline.forward_model import SliceProfile, ThickMeasurement
from pipeline.metrics import OtherSamples, alarm_map, null_part, residual_map, score_at
from pipeline.phantom import Site, nodule
from pipeline.volume import Geometry, Volume

SPACING = (1.0, 1.5, 1.5)
SITES = [Site((22.0, y, x), 5.0, 880.0) for y in (12.0, 24.0, 36.0) for x in (12.0, 24.0, 36.0)]


def scene(samples: int = 8) -> tuple[np.ndarray, ThickMeasurement]:
    """Even lung, and samples of it that differ by noise of 30 HU in what no thick slice shows."""
    shape = (45, 48, 48)
    affine = ((0.0, 0.0, 1.5, 0.0), (0.0, 1.5, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    thin = Geometry(shape, affine, tuple(np.arange(45.0)), 1.0)
    at = thin.with_z(2.0 + 5.0 * np.arange(9), thickness_mm=5.0)
    thick = Volume(np.full(at.shape_zyx, -850.0, np.float32), at)
    measured = ThickMeasurement.of(thick, thin.z_mm, SliceProfile("box", 5.0), 5.0)
    rng = np.random.default_rng(0)
    noise = [null_part(rng.normal(0, 30, shape).astype(np.float32), measured.operator) for _ in range(samples)]
    return -850 + np.asarray(noise), measured


def planted(sites: list[Site], measured: ThickMeasurement, sign: float = 1.0) -> np.ndarray:
    added = np.zeros(measured.shape_zyx, np.float32)
    for site in sites:
        block, hu = nodule(site, added.shape, SPACING)
        added[block] += sign * hu
    return null_part(added, measured.operator)


def others_of(samples: np.ndarray) -> OtherSamples:
    return OtherSamples(samples.mean(axis=0), samples.std(axis=0, ddof=1), len(samples))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_plant_in_one_sample_is_found_though_the_residual_is_silent(sign: float) -> None:
    samples, measured = scene()
    plant = planted(SITES[::2], measured, sign)
    answer = samples[0] + plant
    assert residual_map(answer.astype(np.float32), measured) == pytest.approx(
        residual_map(samples[0].astype(np.float32), measured), abs=1e-3
    ), "what lies in ker A leaves A x as it was"
    alarm = alarm_map(answer, others_of(samples[1:]), measured)
    scores = [score_at(alarm, site.center_zyx, SPACING) for site in SITES]
    assert min(scores[::2]) > 2 * max(scores[1::2])


def test_what_every_sample_invents_alike_cannot_be_found() -> None:
    samples, measured = scene()
    alike = samples + planted(SITES[::2], measured)
    before = alarm_map(samples[0], others_of(samples[1:]), measured)
    after = alarm_map(alike[0], others_of(alike[1:]), measured)
    assert after == pytest.approx(before, abs=0.02)


def test_what_the_thick_slices_contradict_is_found_without_any_difference_between_samples() -> None:
    samples, measured = scene()
    block, hu = nodule(SITES[4], measured.shape_zyx, SPACING)
    wrong = samples.copy()
    wrong[(slice(None), *block)] += hu
    alarm = alarm_map(wrong[0], others_of(wrong[1:]), measured)
    calm = alarm_map(samples[0], others_of(samples[1:]), measured)
    before = [score_at(calm, site.center_zyx, SPACING) for site in SITES]
    assert score_at(alarm, SITES[4].center_zyx, SPACING) > max(5.0, 1.5 * max(before))
    assert score_at(alarm, SITES[0].center_zyx, SPACING) == pytest.approx(before[0], abs=1e-3), "the rest is as it was"


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_faint_plants_are_told_from_empty_places_by_the_shape_of_what_no_thick_slice_shows(sign: float) -> None:
    """A tenth of a solid nodule's contrast, in noise of 30 HU: a mean over differences without their sign found it by
    an AUC of 0.76 or less."""
    places = [Site((z, y, x), 4.0, 160.0) for z in (17.0, 27.0) for y in range(8, 44, 8) for x in range(8, 44, 8)]
    found, empty = [], []
    samples, measured = scene()
    plant = planted(places[::2], measured, sign)
    for answer in range(4):
        others = others_of(np.delete(samples, answer, axis=0))
        alarm = alarm_map(samples[answer] + plant, others, measured)
        at = [score_at(alarm, site.center_zyx, SPACING) for site in places]
        found, empty = found + at[::2], empty + at[1::2]
    assert auc(np.array(found), np.array(empty)) > 0.9


def test_the_alarm_of_a_sample_like_the_others_is_the_size_of_a_standard_normal_number() -> None:
    """In whatever voxel size: the Gaussian leaves independent voxels their variance."""
    samples, measured = scene(24)
    alarm = alarm_map(samples[0], others_of(samples[1:]), measured)
    share = float(np.mean(np.square(alarm)))
    assert 0.4 < share < 1.4


def test_one_other_sample_is_too_few() -> None:
    samples, measured = scene(2)
    with pytest.raises(InputError, match="1 other samples"):
        alarm_map(samples[0], OtherSamples(samples[1], np.zeros_like(samples[1]), 1), measured)
