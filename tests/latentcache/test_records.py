"""The grid of a latent: positions, shape and what still counts as the same grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from latentcache import LatentGrid, linear_neighbours


@dataclass(frozen=True)
class Slices:
    shape_zyx: tuple[int, int, int]
    z_mm: tuple[float, ...]
    spacing_mm_zyx: tuple[float, float, float]


def slices(depth: int, first_mm: float, spacing_mm: float) -> Slices:
    z = tuple(first_mm + spacing_mm * np.arange(depth))
    return Slices((depth, 20, 24), z, (spacing_mm, 1.0, 1.0))


@settings(deadline=None)
@given(st.integers(1, 40), st.floats(-500, 500), st.floats(0.3, 8))
def test_latent_slices_are_the_means_of_the_four_slices_they_cover(depth: int, first: float, spacing: float) -> None:
    volume = slices(depth, first, spacing)
    grid = LatentGrid.of(volume)
    positions = grid.positions()
    assert len(positions) == -(-depth // 4) == grid.shape_zyx[0]
    covered = first + spacing * np.arange(4 * len(positions)).reshape(-1, 4)
    assert positions == pytest.approx(covered.mean(axis=1), abs=1e-9)


@settings(deadline=None)
@given(st.integers(1, 400), st.floats(-2000, 2000), st.floats(0.3, 8))
def test_positions_are_byte_for_byte_those_of_a_row(depth: int, first: float, spacing: float) -> None:
    """As sampling, alignment and batches computed them before the grid had a class: z0 + dz j of a row."""
    volume = slices(depth, first, spacing)
    row = LatentGrid.of(volume)
    assert (row.z0_mm, row.dz_mm) == (volume.z_mm[0] + 1.5 * spacing, 4 * spacing)
    count = -(-depth // 4)
    assert row.positions().tobytes() == (row.z0_mm + row.dz_mm * np.arange(count, dtype=np.float64)).tobytes()
    assert row.positions(count + 3)[2:].tobytes() == (row.z0_mm + row.dz_mm * np.arange(2, count + 3)).tobytes()


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(-16000, 16000), st.integers(2, 64))
def test_positions_are_byte_for_byte_those_that_interpolation_made(depth: int, first: int, spacing: int) -> None:
    """Interpolation reckoned from slice 0, z + dz (1.5 + 4 j): equal where eighths of a millimetre carry no rounding.

    At other spacings, 0.7 mm for one, the two roundings may differ in the last bit; sampling's is used everywhere now.
    """
    volume = slices(depth, first / 8, spacing / 8)
    count = -(-depth // 4)
    before = np.asarray(volume.z_mm[0] + spacing / 8 * (1.5 + 4 * np.arange(count)), np.float64)
    assert LatentGrid.of(volume).positions().tobytes() == before.tobytes()


def test_positions_are_counted_on_into_the_padding() -> None:
    grid = LatentGrid.of(slices(5, 10.0, 1.0))
    assert grid.positions(4).tolist() == [11.5, 15.5, 19.5, 23.5]
    assert grid.shape_zyx == (2, 5, 6)


def test_a_tenth_of_a_slice_is_the_same_grid_and_more_is_another() -> None:
    grid = LatentGrid.of(slices(40, 0.0, 1.0))
    assert grid.matches(LatentGrid(1.5 + 0.09, 4.0, (40, 20, 24)))
    assert not grid.matches(LatentGrid(1.5 + 0.11, 4.0, (40, 20, 24)))
    assert grid.matches(LatentGrid(1.5, 4.0 + 0.09 * 4 / 40, (40, 20, 24)))
    assert not grid.matches(LatentGrid(1.5, 4.0 + 0.11 * 4 / 40, (40, 20, 24)))
    assert not grid.matches(LatentGrid(1.5, 4.0, (39, 20, 24)))


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=12), st.lists(st.floats(-20, 80), min_size=1, max_size=9))
def test_neighbours_interpolate_a_straight_line_and_hold_its_ends(steps: list[float], wanted: list[float]) -> None:
    z_from, z_to = np.cumsum(steps), np.asarray(wanted)
    below, above, weight = linear_neighbours(z_from, z_to)
    assert ((weight >= 0) & (weight <= 1)).all()
    value = (1 - weight) * z_from[below] + weight * z_from[above]
    assert value == pytest.approx(np.clip(z_to, z_from[0], z_from[-1]), abs=1e-9)


def test_a_position_of_a_slice_gives_that_slice_exactly() -> None:
    z = np.asarray([0.1, 0.4, 1.3])
    below, above, weight = linear_neighbours(z, z)
    assert set(weight) <= {0.0, 1.0}
    assert np.where(weight == 1.0, above, below).tolist() == [0, 1, 2]
