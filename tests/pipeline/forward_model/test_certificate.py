"""The mean misfit by tissue: what passes, what fails, and what cannot be judged."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.forward_model import SliceProfile, ThickMeasurement, certificate
from pipeline.forward_model.certificate import LIMIT_HU
from pipeline.volume import Geometry, Volume


def scene(*, lung: bool = True) -> tuple[NDArray[np.float32], ThickMeasurement]:
    """Lung, fat and muscle side by side, 40 thin slices, and the noisy thick ones that they average to."""
    truth = np.full((40, 60, 90), 45.0, np.float32)
    truth[:, :, :30] = -850.0 if lung else 45.0
    truth[:, :, 30:60] = -90.0
    affine = ((0.0, 0.0, 0.7, 0.0), (0.0, 0.7, 0.0, 0.0), (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0))
    thin = Geometry(truth.shape, affine, tuple(np.arange(40.0)), 1.0)
    at = thin.with_z(2.0 + 5.0 * np.arange(8), thickness_mm=5.0)
    blank = Volume(np.zeros(at.shape_zyx, np.float32), at)
    seen = ThickMeasurement.of(blank, thin.z_mm, SliceProfile("box", 5.0), 5.0)
    noise = np.random.default_rng(0).normal(0, 5, at.shape_zyx).astype(np.float32)
    return truth, ThickMeasurement(Volume(seen.operator.apply(truth) + noise, at), seen.operator, 5.0)


def test_the_truth_passes_in_every_tissue() -> None:
    truth, seen = scene()
    found = certificate(truth, seen)
    assert set(found.shift_hu) == {"lung", "fat", "soft_tissue"}
    assert not found.failing
    assert not found.missing
    assert max(abs(v) for v in found.shift_hu.values()) < 0.2
    assert str(found).startswith("certificate passes: lung")


@pytest.mark.parametrize(("tissue", "low", "high"), [("lung", -1000, -500), ("fat", -200, -10), ("soft_tissue", 0, 99)])
def test_a_tissue_that_is_shifted_fails_by_name(tissue: str, low: float, high: float) -> None:
    truth, seen = scene()
    displaced = truth + np.where((truth > low) & (truth < high), np.float32(-2.0), np.float32(0))
    found = certificate(displaced, seen)
    assert found.failing == (tissue,)
    assert found.shift_hu[tissue] == pytest.approx(-2.0, abs=0.3)
    assert f"FAILS: {tissue.replace('_', ' ')} -2." in str(found)
    assert abs(found.shift_hu[tissue]) > LIMIT_HU


def test_no_lung_in_the_field_is_said_and_not_passed_over() -> None:
    truth, seen = scene(lung=False)
    found = certificate(truth, seen)
    assert found.missing == ("lung",)
    assert "lung" not in found.shift_hu
    assert "not computed: too little lung in the field" in str(found)
    assert found.figures()["missing"] == ["lung"]


def test_detail_that_no_thick_slice_sees_changes_nothing() -> None:
    truth, seen = scene()
    ripple = np.tile(np.array([30, -60, 30, 0, 0], np.float32), 8)[:, None, None]
    assert certificate(truth + ripple, seen).shift_hu == pytest.approx(certificate(truth, seen).shift_hu, abs=1e-3)
