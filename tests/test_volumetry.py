"""Volumes of balls and tubes with known volume, sharp and after thick slices."""

from __future__ import annotations

import numpy as np
import pytest

from latentcache.errors import InputError
from pipeline.baselines import apply, weights
from pipeline.slice_profile import SliceProfile, slice_operator
from pipeline.volumetry import ball, integrated_volume, threshold_volume, tube

SPACING = (1.0, 0.7, 0.7)
VOXEL = 0.7 * 0.7
LUNG, SOLID = -850.0, 40.0


def nodule(radius: float) -> np.ndarray:
    share = ball((40, 40, 40), SPACING, (19.3, 13.9, 14.2), radius)
    return LUNG + share * (SOLID - LUNG)


@pytest.mark.parametrize("radius", [3.0, 5.0, 8.0])
def test_a_ball_has_its_volume(radius: float) -> None:
    truth = 4 / 3 * np.pi * radius**3
    hu = nodule(radius)
    assert integrated_volume(hu, VOXEL, SOLID, LUNG) == pytest.approx(truth, rel=0.01)
    assert threshold_volume(hu, VOXEL, (19, 20, 20), SOLID, LUNG) == pytest.approx(truth, rel=0.05)


def test_a_tube_has_its_volume() -> None:
    share = tube((20, 40, 60), SPACING, (10.2, 14.1, 21.0), 2.5, 25.0)
    truth = np.pi * 2.5**2 * 25.0
    # Within 2%: the tube's flat ends fall on a raster of 0.14 mm.
    assert integrated_volume(300 * share + 40 * (1 - share), VOXEL, 300, 40) == pytest.approx(truth, rel=0.02)


def test_integration_survives_thick_slices_and_the_threshold_does_not() -> None:
    hu = nodule(3.0)
    thin, thick = np.arange(40.0), np.arange(2.0, 40.0, 5.0)
    operator = slice_operator(SliceProfile("box", 5.0), thick, thin)
    linear = apply(weights("linear", thick, thin, operator.profile), operator.apply(hu))
    truth = 4 / 3 * np.pi * 3.0**3
    assert integrated_volume(linear, VOXEL, SOLID, LUNG) == pytest.approx(truth, rel=0.02)
    measured = threshold_volume(linear, VOXEL, (19, 20, 20), SOLID, LUNG)
    assert abs(measured / truth - 1) > 0.1, "half-level volumetry of a 6 mm nodule in 5 mm slices is off"


def test_a_lost_nodule_is_said() -> None:
    with pytest.raises(InputError, match="half its contrast"):
        threshold_volume(np.full((5, 5, 5), LUNG), VOXEL, (2, 2, 2), SOLID, LUNG)
