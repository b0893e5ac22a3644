"""In-plane resampling by physical position: checked on ramps, which linear interpolation must reproduce."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.volume import Geometry, Volume, beyond_mm, grid_difference, onto_field
from pipeline.volume.in_plane_grid import RESAMPLED_FLAG


def lattice(
    shape: tuple[int, int, int],
    pixel: tuple[float, float] = (1.0, 1.0),
    corner: tuple[float, float] = (0.0, 0.0),
    turn_deg: float = 0.0,
    tilt_deg: float = 0.0,
    z0: float = 0.0,
    dz: float = 5.0,
) -> Geometry:
    """Axial slices; turned in plane about their first pixel, or sheared along y as under a gantry tilt."""
    a, t = np.radians(turn_deg), np.radians(tilt_deg)
    across, down = np.array([1.0, 0.0, 0.0]), np.array([0.0, np.cos(t), np.sin(t)])
    row, column = np.cos(a) * across + np.sin(a) * down, np.cos(a) * down - np.sin(a) * across
    affine = np.eye(4)
    affine[:3, 0] = (0.0, 0.0, dz / np.cos(t))
    affine[:3, 1], affine[:3, 2] = column * pixel[0], row * pixel[1]
    affine[:3, 3] = (*corner, z0 / np.cos(t))
    normal = np.cross(row, column)
    z = float(affine[:3, 3] @ normal) + dz * np.arange(shape[0])
    return Geometry(shape, tuple(map(tuple, affine.tolist())), tuple(z.tolist()), dz)


def places(geometry: Geometry) -> NDArray[np.float64]:
    """LPS position of every voxel, (z, y, x, 3)."""
    index = np.indices(geometry.shape_zyx).reshape(3, -1)
    at = geometry.affine[:3, :3] @ index + geometry.affine[:3, 3:]
    return at.T.reshape(*geometry.shape_zyx, 3)


def ramp(geometry: Geometry) -> NDArray[np.float32]:
    return (places(geometry) @ np.array([3.0, -2.0, 0.5]) + 40).astype(np.float32)


THICK = lattice((4, 40, 36), (1.0, 1.2), (-18.0, -20.0))


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    pixel=st.tuples(st.floats(0.2, 0.95), st.floats(0.2, 0.95)),
    start=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    turn=st.floats(-0.5, 0.5),
    tilt=st.floats(-25, 25),
)
def test_a_ramp_is_reproduced_wherever_the_field_lies(
    size: tuple[int, int], pixel: tuple[float, float], start: tuple[float, float], turn: float, tilt: float
) -> None:
    thick = lattice((4, 40, 36), (1.0, 1.2), (-18.0, -20.0), tilt_deg=tilt)
    # Room for the turned field within 39 mm x 42 mm.
    corner = (-18.0 + 0.5 + start[1] * 2, -20.0 + 0.5 + start[0] * 0.3)
    rows = min(size[0], int(36 / pixel[0]))
    columns = min(size[1], int(38 / pixel[1]))
    field = lattice((9, rows, columns), pixel, corner, turn, tilt, z0=1.0, dz=1.5)
    resampled = onto_field(Volume(ramp(thick), thick), field)
    assert resampled.geometry.z_mm == thick.z_mm
    assert resampled.flags == (RESAMPLED_FLAG,)
    np.testing.assert_allclose(resampled.geometry.spacing_mm_zyx[1:], field.spacing_mm_zyx[1:])
    np.testing.assert_allclose(resampled.hu, ramp(resampled.geometry), atol=2e-3)


def test_one_grid_comes_back_untouched() -> None:
    volume = Volume(np.zeros((4, 40, 36), np.int16), THICK)
    thin = lattice((20, 40, 36), (1.0, 1.2), (-18.1, -20.1), dz=1.0)
    assert onto_field(volume, thin) is volume
    assert grid_difference(THICK, thin) == ""


@pytest.mark.parametrize(
    ("field", "beyond"),
    [
        (lattice((9, 40, 36), (1.0, 1.2), (-18.0, -20.0)), 0.0),
        (lattice((9, 30, 30), (1.0, 1.2), (-18.6, -20.5)), 0.0),
        (lattice((9, 30, 30), (1.0, 1.2), (-19.6, -20.0)), 1.0),
        (lattice((9, 40, 30), (1.0, 1.2), (-18.0, -16.0)), 3.5),
        (lattice((9, 80, 72), (1.0, 1.2), (-36.0, -40.0)), 24.6),
    ],
)
def test_how_far_a_field_reaches_beyond_the_measured_one(field: Geometry, beyond: float) -> None:
    assert beyond_mm(field, THICK) == pytest.approx(beyond)
    volume = Volume(np.zeros((4, 40, 36), np.int16), THICK)
    if beyond:
        with pytest.raises(InputError, match=f"{beyond:.1f} mm beyond the measured one"):
            onto_field(volume, field)
    else:
        assert onto_field(volume, field).hu.shape == (4, *field.shape_zyx[1:])


def test_larger_pixels_average_what_they_cover() -> None:
    """Sampling at points would keep the noise of single pixels; a pixel of 3 x 3 holds the mean of nine."""
    noise = np.random.default_rng(0).normal(0, 30, (3, 96, 96)).astype(np.float32)
    fine = lattice((3, 96, 96), (0.5, 0.5))
    coarse = lattice((9, 31, 31), (1.5, 1.5), (0.75, 0.75), dz=1.0)
    hu = onto_field(Volume(noise + 50, fine), coarse).hu
    assert hu.mean() == pytest.approx(50, abs=1)
    assert hu.std() < 30 / 2


def test_what_differs_is_named() -> None:
    assert grid_difference(THICK, lattice((9, 40, 40), (1.0, 1.2), (-18.0, -20.0))) == "another in-plane matrix"
    assert grid_difference(THICK, lattice((9, 40, 36), (0.9, 1.2), (-18.0, -20.0))) == "another pixel spacing"
    shifted = replace(THICK, affine_lps=lattice((4, 40, 36), (1.0, 1.2), (-17.4, -20.0)).affine_lps)
    assert grid_difference(THICK, shifted) == "in-plane grids are 0.50 pixels apart"
