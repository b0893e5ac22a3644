"""A NIfTI file's axes to zyx in LPS and back: no voxel moves, whatever the layout."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings, strategies as st

from pipeline.volume import Geometry, NiftiLayout

LAYOUTS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1.0, -1.0), repeat=3)
]


@settings(deadline=None)
@given(st.sampled_from(LAYOUTS), st.floats(-0.3, 0.3))
def test_every_voxel_stays_where_it_was(layout: tuple[tuple[int, ...], tuple[float, ...]], angle: float) -> None:
    order, signs = layout
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    ras = np.eye(4)
    ras[:3, :3] = turn @ (np.eye(3)[:, list(order)] * np.asarray(signs) * np.asarray([0.7, 0.8, 5.0])[list(order)])
    ras[:3, 3] = 11.0, -7.0, 3.0
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    own = NiftiLayout.of(ras)
    zyx = own.to_zyx(array)
    lps = own.affine_lps(ras, zyx.shape)
    assert (np.diag(lps[[2, 1, 0], :3]) > 0).all()  # z to the head, y to the back, x to the left
    for index in np.ndindex(array.shape):
        place = (ras @ (*index, 1.0))[:3] * (-1, -1, 1)
        (found,) = np.argwhere(zyx == array[index])
        np.testing.assert_allclose((lps @ (*found, 1.0))[:3], place, atol=1e-9)
    np.testing.assert_array_equal(own.from_zyx(zyx), array)
    z = tuple(lps[2, 3] + lps[2, 0] * np.arange(zyx.shape[0]))
    geometry = Geometry(zyx.shape, tuple(tuple(row) for row in lps), z, 0.0)
    np.testing.assert_allclose(own.affine_ras(geometry), ras, atol=1e-9)
