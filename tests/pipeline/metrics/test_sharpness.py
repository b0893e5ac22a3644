"""Edge width and MTF along z against the closed forms of a Gaussian-blurred edge."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import ndtr

from latentcache import InputError
from pipeline.metrics import find_edges, sharpness
from pipeline.metrics.sharpness import modulation_transfer


def slanted(sigma_mm: float, spacing: float = 1.0, depth: int = 44, flip: bool = False) -> np.ndarray:
    """A dome-like edge between -700 and 0 HU whose height changes from column to column."""
    y, x = np.mgrid[:24, :24]
    height = 20 + 0.13 * y + 0.09 * x
    z = spacing * np.arange(depth)[:, None, None]
    share = ndtr((z - height * spacing) / sigma_mm)
    return -700 + 700 * (1 - share if flip else share)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("sigma", [1.0, 1.8])
def test_a_gaussian_edge_has_its_closed_form_width_and_mtf(sigma: float, flip: bool) -> None:
    volume = slanted(sigma, flip=flip)
    found = sharpness(volume, find_edges(volume, 1.0))
    # Within 3%: the mean edge is sampled in bins of 0.25 mm around crossings that are linearly interpolated.
    assert found.width_mm == pytest.approx(2 * 1.2816 * sigma, rel=0.03)
    assert found.mtf50_per_mm == pytest.approx(np.sqrt(np.log(2) / 2) / (np.pi * sigma), rel=0.03)
    assert found.edges == 24 * 24


def test_a_blurred_or_moved_edge_is_charged_at_the_truths_place() -> None:
    truth = slanted(0.8)
    edges = find_edges(truth, 1.0)
    sharp, blurred = sharpness(truth, edges), sharpness(slanted(2.0), edges)
    assert blurred.width_mm > 1.8 * sharp.width_mm
    assert blurred.mtf50_per_mm is not None
    assert sharp.mtf50_per_mm is not None
    assert blurred.mtf50_per_mm < 0.6 * sharp.mtf50_per_mm


def test_mtf_of_a_gaussian_is_exact_on_a_fine_edge() -> None:
    z = np.arange(-12, 12, 0.02)
    frequency, mtf = modulation_transfer(z, ndtr(z / 1.5))
    low = frequency < 0.3
    assert mtf[low] == pytest.approx(np.exp(-2 * (np.pi * 1.5 * frequency[low]) ** 2), abs=1e-6)


def test_no_edge_is_said() -> None:
    flat = np.full((40, 12, 12), 30.0)
    with pytest.raises(InputError, match="0 edges"):
        find_edges(flat, 1.0)
    with pytest.raises(InputError, match="6 slices"):
        find_edges(flat[:6], 1.0)
