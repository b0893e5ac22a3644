"""Lung density in a made chest with known shares."""

from __future__ import annotations

import numpy as np
import pytest

from latentcache import InputError, NonFiniteError
from pipeline.metrics import lung_density, lung_mask


@pytest.fixture
def chest() -> np.ndarray:
    """Air around a body with two lungs at -850 HU, one tenth of them at -980."""
    hu = np.full((20, 60, 80), -1000.0)
    hu[:, 5:55, 5:75] = 40.0
    for left in (10, 45):
        hu[2:18, 15:45, left : left + 25] = -850.0
        hu[2:18, 15:18, left : left + 25] = -980.0
    return hu


def test_the_lungs_are_found_without_the_air_outside(chest: np.ndarray) -> None:
    assert lung_mask(chest).sum() == 2 * 16 * 30 * 25


def test_density_has_its_closed_form(chest: np.ndarray) -> None:
    found = lung_density(chest, lung_mask(chest), voxel_mm3=2.0)
    assert found.laa950 == pytest.approx(0.1)
    assert found.mean_hu == pytest.approx(0.1 * -980 + 0.9 * -850)
    assert found.pd15_hu == pytest.approx(np.percentile([-980.0] * 10 + [-850.0] * 90, 15))
    assert found.volume_ml == pytest.approx(2 * 16 * 30 * 25 * 2 / 1000)


def test_a_shift_of_lung_hu_is_seen(chest: np.ndarray) -> None:
    mask = lung_mask(chest)
    assert lung_density(chest - 110, mask, 1.0).laa950 == pytest.approx(1.0)


def test_bad_input_is_said(chest: np.ndarray) -> None:
    with pytest.raises(InputError, match="no lung"):
        lung_mask(np.full((5, 20, 20), 40.0))
    with pytest.raises(InputError, match="empty mask"):
        lung_density(chest, np.zeros(chest.shape, bool), 1.0)
    broken = chest.copy()
    broken[5, 20, 12] = np.nan
    with pytest.raises(NonFiniteError):
        lung_density(broken, lung_mask(chest), 1.0)
