"""Structural similarity against scikit-image and torchmetrics, and the one pass against each index alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from latentcache import InputError
from pipeline.metrics import similarities, ssim
from pipeline.metrics.similarity import ms_ssim, ssim_3d
from tests.pipeline.metrics.test_intensity import volumes

SETTINGS = {"data_range": 400, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}


def test_ssim_equals_scikit_image() -> None:
    p, t = volumes(shape=(3, 24, 32))
    expected = np.mean([structural_similarity(a, b, full=False, **SETTINGS) for a, b in zip(p, t, strict=True)])
    assert ssim(p, t, data_range=400) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("depth", [11, 13, 29])
def test_ssim_of_volumes_equals_scikit_image(depth: int) -> None:
    p, t = volumes(shape=(depth, 24, 32))
    assert ssim_3d(p, t, data_range=400) == pytest.approx(structural_similarity(p, t, **SETTINGS), abs=1e-6)


def test_ms_ssim_equals_torchmetrics_and_scikit_image() -> None:
    """Contrast factors from torchmetrics, the last scale's SSIM from scikit-image.

    torchmetrics' own MS-SSIM counts the mirrored border at the last scale, where it is most of an 11x11 image; taken as
    it is, it differs by 5e-5 here.
    """
    from torchmetrics.functional.image.ssim import _ssim_update

    rng = np.random.default_rng(1)
    t = np.cumsum(np.cumsum(rng.normal(0, 1, (1, 177, 190)), 1), 2)
    p = t + rng.normal(0, 0.2 * t.std(), t.shape)
    span = float(np.ptp(t))
    expected, a, b = 1.0, torch.from_numpy(p)[:, None], torch.from_numpy(t)[:, None]
    for weight in (0.0448, 0.2856, 0.3001, 0.2363):
        _, contrast = _ssim_update(a, b, data_range=span, return_contrast_sensitivity=True)
        expected *= float(contrast[0]) ** weight
        a, b = (torch.nn.functional.avg_pool2d(x, 2) for x in (a, b))
    last = structural_similarity(a[0, 0].numpy(), b[0, 0].numpy(), **{**SETTINGS, "data_range": span})
    expected *= last**0.1333
    assert ms_ssim(p, t, data_range=span) == (pytest.approx(expected, abs=1e-6), 5)


def test_ms_ssim_says_how_many_scales_a_small_slice_allows() -> None:
    p, t = volumes(shape=(2, 48, 64))
    value, scales = ms_ssim(p, t, data_range=400)
    assert scales == 3
    assert 0 < value < 1
    assert ms_ssim(t, t, data_range=400)[0] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [(14, 45, 23), (5, 24, 48)])
def test_one_pass_gives_what_each_index_gives_alone(shape: tuple[int, int, int]) -> None:
    p, t = volumes(2, shape)
    found = similarities(p, t, data_range=400)
    assert found.ssim == pytest.approx(ssim(p, t, data_range=400), rel=1e-12)
    assert (found.ms_ssim, found.scales) == (pytest.approx(ms_ssim(p, t, data_range=400)[0], rel=1e-12), 2)
    if shape[0] >= 11:
        assert found.ssim_3d == pytest.approx(structural_similarity(p, t, **SETTINGS), abs=1e-6)
    else:
        assert found.ssim_3d is None


def test_what_is_too_small_is_said() -> None:
    p, t = volumes(shape=(5, 24, 32))
    with pytest.raises(InputError, match="5 voxels along axis 0"):
        ssim_3d(p, t, data_range=400)
    for measure in (ssim, ms_ssim, similarities):
        with pytest.raises(InputError, match="10 voxels along axis 2"):
            measure(p[:, :, :10], t[:, :, :10], data_range=400)
