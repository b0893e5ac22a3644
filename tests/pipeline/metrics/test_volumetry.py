"""Volumes of balls and tubes with known volume, sharp and after thick slices."""

from __future__ import annotations

import numpy as np
import pytest

from latentcache import InputError
from pipeline.forward_model import SliceProfile, apply, slice_operator, weights
from pipeline.metrics import Structure, holds, volume_errors
from pipeline.metrics.volumetry import ball, half_level_volume, integrated_volume, threshold_volume, tube
from pipeline.volume import Geometry

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


LATTICE = Geometry(
    (40, 40, 40), ((0.0, 0.0, 0.7, -5.0), (0.0, 0.7, 0.0, 3.0), (1.0, 0.0, 0.0, 100.0), (0.0, 0.0, 0.0, 1.0)),
    tuple(100.0 + np.arange(40.0)), 1.0,
)  # fmt: skip


def placed(radius: float, volume: float | None = None) -> Structure:
    """The ball of ``nodule`` in patient coordinates."""
    at = (14.2 - 5.0, 13.9 + 3.0, 119.3)
    known = 4 / 3 * np.pi * radius**3 if volume is None else volume
    return Structure("nodule", at, at, radius, known, SOLID, LUNG)


@pytest.mark.parametrize("radius", [4.0, 6.0, 8.0])
def test_the_half_level_of_a_placed_ball_is_its_volume(radius: float) -> None:
    ball_structure = placed(radius)
    assert holds(LATTICE, ball_structure)
    # Counting whole voxels of 0.5 mm^3: 3% at 4 mm, less above.
    assert half_level_volume(nodule(radius), LATTICE, ball_structure) == pytest.approx(
        4 / 3 * np.pi * radius**3, rel=0.03
    )


def test_a_stretch_of_vessel_ends_at_its_planes() -> None:
    share = tube((40, 40, 40), SPACING, (19.3, 13.9, 13.0), 3.0, 60.0)
    hu = LUNG + share * (300 - LUNG)
    ends = [(x, 13.9 + 3.0, 119.3) for x in (1.0, 15.0)]
    stretch = Structure("vessel", ends[0], ends[1], 3.0, np.pi * 9 * 14, 300, LUNG)
    # A cross-section of 40 voxels is counted to about 5%.
    assert half_level_volume(hu, LATTICE, stretch) == pytest.approx(np.pi * 9 * 14, rel=0.05)


def test_errors_are_relative_summed_and_count_what_is_missed() -> None:
    hu = nodule(5.0)
    measured = half_level_volume(hu, LATTICE, placed(5.0))
    lost = Structure("nodule", (12.0, 6.0, 105.0), (12.0, 6.0, 105.0), 2.0, 100.0, SOLID, LUNG)
    found = volume_errors(hu, LATTICE, [placed(5.0, measured / 1.25), lost])["nodule"]
    assert found["count"] == 2
    assert found["missed"] == 1
    assert found["mean_absolute_error"] == pytest.approx((0.25 + 1) / 2)
    assert found["total_error"] == pytest.approx(measured / (measured / 1.25 + 100) - 1)
    assert not holds(LATTICE, Structure("nodule", (-4.0, 6.0, 105.0), (-4.0, 6.0, 105.0), 2.0, 1.0, SOLID, LUNG))
