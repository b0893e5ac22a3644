"""The alarm on plants that no thick slice shows, and intervals that hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from latentcache import InputError
from pipeline.evaluation import Intervals, OtherSamples, alarm_map, auc, score_at
from pipeline.evaluation.fabrication import residual_map
from pipeline.forward_model import SliceProfile, ThickMeasurement
from pipeline.metrics import null_part
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
    assert score_at(alarm, SITES[4].center_zyx, SPACING) > 5
    assert score_at(alarm, SITES[0].center_zyx, SPACING) < 2


def test_one_other_sample_is_too_few() -> None:
    samples, measured = scene(2)
    with pytest.raises(InputError, match="1 other samples"):
        alarm_map(samples[0], OtherSamples(samples[1], np.zeros_like(samples[1]), 1), measured)


def test_auc_is_the_share_of_pairs_in_order_and_a_half_for_ties() -> None:
    assert auc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert auc(np.array([1.0]), np.array([1.0])) == 0.5
    assert auc(np.array([1.0, 3.0]), np.array([2.0, 0.0])) == 0.75
    rng = np.random.default_rng(1)
    apart = auc(rng.normal(1, 1, 4000), rng.normal(0, 1, 4000))
    assert apart == pytest.approx(norm.cdf(1 / np.sqrt(2)), abs=0.015)
    with pytest.raises(InputError):
        auc(np.array([]), np.array([1.0]))
    with pytest.raises(InputError):
        auc(np.array([np.nan]), np.array([1.0]))


def test_calibrated_intervals_hold_nine_in_ten_of_other_patients_truths_at_every_spread() -> None:
    """Spreads that are too small by a factor of their own: the scale by bin makes up for it."""
    rng = np.random.default_rng(2)

    def errors(count: int) -> tuple[np.ndarray, np.ndarray]:
        spread = np.exp(rng.uniform(np.log(5), np.log(100), count))
        return rng.standard_t(5, count) * spread * np.where(spread > 30, 2.0, 1.2), spread

    intervals = Intervals.calibrated(*errors(40_000))
    error, spread = errors(40_000)
    assert 0.88 <= intervals.coverage(error, spread) <= 0.92
    for low, high in ((5, 20), (40, 100)):
        chosen = (spread > low) & (spread < high)
        assert 0.88 <= intervals.coverage(error[chosen], spread[chosen]) <= 0.92
    assert np.mean(np.abs(error) <= 1.645 * spread) < 0.8, "uncalibrated, they promise too much"
    with pytest.raises(InputError, match="voxels"):
        Intervals.calibrated(error[:50], spread[:50])
