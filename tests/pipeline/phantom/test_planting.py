"""Planted nodules: their volume, their places, and the same ones for the same generator."""

from __future__ import annotations

import numpy as np
import pytest

from latentcache import InputError
from pipeline.phantom import Site, choose_sites, nodule

SPACING = (1.0, 1.5, 1.5)


@pytest.mark.parametrize("diameter", [3.0, 5.0, 8.0])
def test_a_nodule_has_the_volume_of_its_sphere(diameter: float) -> None:
    block, added = nodule(Site((20.3, 15.1, 16.8), diameter, 500.0), (40, 32, 32), SPACING)
    volume = float(added.sum()) / 500 * np.prod(SPACING)
    assert volume == pytest.approx(np.pi / 6 * diameter**3, rel=0.06)
    center = [(s.start + s.stop - 1) / 2 for s in block]
    assert center == pytest.approx((20.3, 15.1, 16.8), abs=1.0)
    assert added.max() <= 500


def test_a_nodule_at_the_border_keeps_within_the_volume() -> None:
    block, added = nodule(Site((0.0, 0.0, 31.0), 8.0, 100.0), (40, 32, 32), SPACING)
    assert added.shape == np.zeros((40, 32, 32))[block].shape
    assert 0 < float(added.sum()) * np.prod(SPACING) / 100 < np.pi / 6 * 8**3 / 2


def test_sites_lie_in_even_lung_apart_from_each_other_and_are_the_same_again() -> None:
    hu = np.full((60, 80, 80), 40.0, np.float32)
    hu[:, 10:70, 10:70] = -850
    hu[:, 38:42, 10:70] = 40
    sites = choose_sites(np.random.default_rng(3), hu, SPACING, 20)
    assert sites == choose_sites(np.random.default_rng(3), hu, SPACING, 20)
    centers = np.array([site.center_zyx for site in sites])
    assert all(hu[tuple(np.rint(c).astype(int))] == -850 for c in centers)
    away = np.abs(centers[:, None] - centers[None]) * SPACING
    near = (away[..., 0] < 25) & (away[..., 1:].max(axis=-1) < 14)
    assert near.sum() == len(sites), "each is near itself only"
    assert {3.0 <= site.diameter_mm <= 8.0 for site in sites} == {True}
    with pytest.raises(InputError, match="room for"):
        choose_sites(np.random.default_rng(3), hu, SPACING, 5000)
