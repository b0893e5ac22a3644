"""Emphysema of a known extent: the share that was asked for, in the lung alone."""

from __future__ import annotations

import numpy as np
import pytest

from latentcache import InputError
from pipeline.metrics import lung_density, lung_mask
from pipeline.phantom import make_patient, with_emphysema

SPACING = (1.0, 320 / 64, 320 / 64)


@pytest.fixture(scope="module")
def chest() -> tuple[np.ndarray, np.ndarray]:
    truth = make_patient(4, 64, 60).thin_truth
    return truth, lung_mask(truth)


@pytest.mark.parametrize("wanted", [0.05, 0.2, 0.4])
def test_the_share_below_the_threshold_is_the_one_asked_for(
    chest: tuple[np.ndarray, np.ndarray], wanted: float
) -> None:
    truth, lung = chest
    made = with_emphysema(truth, lung, SPACING, wanted, seed=1)
    assert made.laa950 == pytest.approx(wanted, abs=0.002)
    assert lung_density(made.hu, lung, 1.0).laa950 == pytest.approx(made.laa950), "as the metric measures it"
    np.testing.assert_array_equal(made.hu[~lung], truth[~lung])
    vessels = lung & (truth >= -700)
    np.testing.assert_array_equal(made.hu[vessels], truth[vessels])
    assert np.all(made.hu <= truth)
    again = with_emphysema(truth, lung, SPACING, wanted, seed=1)
    np.testing.assert_array_equal(again.hu, made.hu)
    assert not np.array_equal(with_emphysema(truth, lung, SPACING, wanted, seed=2).hu, made.hu)


def test_none_is_the_lung_as_it_was_and_what_cannot_be_is_refused(chest: tuple[np.ndarray, np.ndarray]) -> None:
    truth, lung = chest
    own = float(np.mean(truth[lung] < -950))
    made = with_emphysema(truth, lung, SPACING, min(0.4, own), seed=1)
    np.testing.assert_array_equal(made.hu, truth)
    assert made.laa950 == own
    with pytest.raises(InputError, match=r"LAA-950 of 0\.5"):
        with_emphysema(truth, lung, SPACING, 0.5, seed=1)
    with pytest.raises(InputError, match="without any hole"):
        with_emphysema(np.where(lung, np.float32(-990), truth), lung, SPACING, 0.1, seed=1)
