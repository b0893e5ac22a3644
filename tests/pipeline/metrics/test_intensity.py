"""Metrics against scikit-image, torchmetrics and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from skimage.metrics import peak_signal_noise_ratio

from latentcache import InputError, NonFiniteError
from pipeline.metrics import intensity as metrics


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


def test_a_mask_chooses_the_voxels() -> None:
    t = np.zeros((3, 8, 8))
    p = t.copy()
    p[1] = 10.0
    mask = np.zeros(t.shape, bool)
    mask[1, :2] = True
    assert metrics.mean_squared_error(p, t, mask) == pytest.approx(100)
    assert metrics.mean_absolute_error(p, t, mask) == pytest.approx(10)
    assert metrics.mean_squared_error(p, t) == pytest.approx(100 / 3)
    assert metrics.mean_squared_error(p, t, between=(-4.0, 4.0)) == pytest.approx(16 / 3)


def test_psnr_of_identical_volumes_is_infinite() -> None:
    _, t = volumes()
    assert metrics.psnr(t, t, data_range=400) == float("inf")


def test_bias_by_tissue_finds_a_shift_in_one_class() -> None:
    truth = np.full((12, 24, 24), 40.0)
    truth[:, :12] = -850.0
    shifted = truth + np.where(truth < -500, -16.0, 3.0)
    found = metrics.bias_by_tissue(shifted, truth)
    assert found["lung"]["bias_hu"] == pytest.approx(-16)
    assert found["soft_tissue"]["bias_hu"] == pytest.approx(3)
    assert "bone" not in found


def test_bias_by_tissue_does_not_depend_on_its_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    p, t = volumes(3, (21, 30, 30))
    t = np.where(np.indices(t.shape).sum(0) % 40 < 25, 40.0, -850.0) + 0.01 * t
    whole = metrics.bias_by_tissue(p, t)
    assert whole
    monkeypatch.setattr(metrics, "SLAB", 100)
    assert metrics.bias_by_tissue(p, t) == {k: pytest.approx(v) for k, v in whole.items()}


def test_error_by_phase_is_zero_on_thick_positions_and_largest_between() -> None:
    thin = np.arange(0.0, 21.0)
    thick = np.arange(0.0, 21.0, 5.0)
    truth = np.zeros((21, 4, 4))
    distance = np.abs(thin[:, None] - thick[None]).min(1)
    rows = metrics.error_by_phase(truth + 3 * distance[:, None, None], truth, thin, thick)
    assert [r["phase"] for r in rows] == pytest.approx([0.0, 0.2, 0.4])
    assert [r["rmse_hu"] for r in rows] == pytest.approx([0.0, 3.0, 6.0])
    assert [r["slices"] for r in rows] == [5, 8, 8]


def test_bad_input_is_said_not_averaged() -> None:
    p, t = volumes()
    with pytest.raises(InputError, match="equal shapes"):
        metrics.psnr(p[1:], t, data_range=400)
    with pytest.raises(InputError, match="empty mask"):
        metrics.psnr(p, t, data_range=400, mask=np.zeros(t.shape, bool))
    with pytest.raises(InputError, match="without a voxel"):
        metrics.mean_absolute_error(p[:0], t[:0])
    p[0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="1 non-finite voxels in the prediction"):
        metrics.psnr(p, t, data_range=400)
