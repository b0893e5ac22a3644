"""Metrics against scikit-image and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from latentcache.errors import InputError, NonFiniteError
from pipeline import metrics


def volumes(seed: int = 0, shape: tuple[int, int, int] = (4, 24, 32)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.normal(40, 80, shape)
    return truth + rng.normal(0, 20, shape), truth


def test_psnr_equals_scikit_image() -> None:
    p, t = volumes()
    assert metrics.psnr(p, t, data_range=400) == pytest.approx(peak_signal_noise_ratio(t, p, data_range=400), abs=1e-9)


@given(offset=st.floats(0.5, 200), data_range=st.sampled_from([400.0, 2000.0, 3072.0]))
def test_psnr_of_a_constant_offset_is_the_closed_form(offset: float, data_range: float) -> None:
    t = np.zeros((2, 3, 4))
    expected = 20 * np.log10(data_range / offset)
    assert metrics.psnr(t + offset, t, data_range=data_range) == pytest.approx(expected, abs=1e-9)


def test_psnr_of_identical_volumes_is_infinite() -> None:
    _, t = volumes()
    assert metrics.psnr(t, t, data_range=400) == float("inf")


@pytest.mark.parametrize("axes", [(1, 2), (0, 1, 2)])
def test_ssim_equals_scikit_image(axes: tuple[int, ...]) -> None:
    p, t = volumes(shape=(13, 24, 32))
    settings = {"data_range": 400, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    if axes == (1, 2):
        pairs = zip(p, t, strict=True)
        expected = np.mean([structural_similarity(a, b, full=False, **settings) for a, b in pairs])
    else:
        expected = structural_similarity(p, t, **settings)
    assert metrics.ssim(p, t, data_range=400, axes=axes) == pytest.approx(expected, abs=1e-6)


def test_bias_by_tissue_finds_a_shift_in_one_class() -> None:
    truth = np.full((12, 24, 24), 40.0)
    truth[:, :12] = -850.0
    shifted = truth + np.where(truth < -500, -16.0, 3.0)
    found = metrics.bias_by_tissue(shifted, truth)
    assert found["lung"]["bias_hu"] == pytest.approx(-16)
    assert found["soft_tissue"]["bias_hu"] == pytest.approx(3)
    assert "bone" not in found


def test_bad_input_is_said_not_averaged() -> None:
    p, t = volumes()
    with pytest.raises(InputError, match="equal shapes"):
        metrics.psnr(p[1:], t, data_range=400)
    with pytest.raises(InputError, match="empty mask"):
        metrics.psnr(p, t, data_range=400, mask=np.zeros(t.shape, bool))
    p[0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="1 non-finite voxels in the prediction"):
        metrics.psnr(p, t, data_range=400)
    with pytest.raises(InputError, match="at least 11"):
        metrics.ssim(t, t, data_range=400, axes=(0, 1, 2))
