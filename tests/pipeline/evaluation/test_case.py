"""The harness tested on itself: truth is perfect, every planted fault is caught, bad cases never reach a mean."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from latentcache import InputError
from pipeline.evaluation import failed
from pipeline.evaluation.case import Case, CaseScores, finite, score, score_method
from pipeline.evaluation.results import summarise
from pipeline.forward_model import SliceProfile, apply, check_operator, default_profile, slice_operator, weights
from pipeline.phantom import make_patient
from pipeline.volume import Geometry, Volume, Window, common_slices

SOFT, WIDE = Window(), Window(0.0, 2000.0)


@pytest.fixture(scope="module")
def pair() -> tuple[Volume, Volume]:
    """(thick, thin) of one phantom."""
    patient = make_patient(5, size=96, n_thin=70)
    return patient.thick, patient.thin


@pytest.fixture(scope="module")
def case(pair: tuple[Volume, Volume]) -> Case:
    thick, thin = pair
    inside = common_slices(thick.geometry, thin.geometry)
    geometry = thin.geometry.with_z(np.array(thin.geometry.z_mm)[inside])
    profile = default_profile(thick.geometry.thickness_mm, thick.geometry.spacing_mm_zyx[0])
    operator = slice_operator(profile, np.array(thick.geometry.z_mm), np.array(geometry.z_mm))
    return Case(thin.hu[inside], geometry, thick.geometry.z_mm, operator, thick.hu)


@pytest.fixture(scope="module")
def linear(pair: tuple[Volume, Volume], case: Case) -> np.ndarray:
    assert case.geometry is not None
    assert case.operator is not None
    return apply(
        weights("linear", np.array(pair[0].geometry.z_mm), np.array(case.geometry.z_mm), case.operator.profile),
        pair[0].hu,
    )


def psnr(volume: np.ndarray, case: Case) -> float:
    return float(score("k", "APE", case.truth, {"m": volume}, WIDE).scores["m"]["psnr_db"])


def test_the_truth_scores_perfect(case: Case) -> None:
    found = score_method(case.truth, case, WIDE)
    assert found["psnr_db"] is None
    assert found["identical"]
    assert found["psnr_3072_db"] is None
    for name in ("ssim", "ssim_3d"):
        assert found[name] == pytest.approx(1)
    assert found["ms_ssim"]["value"] == pytest.approx(1)
    assert found["mae_hu"] == 0
    assert all(row["bias_hu"] == 0 == row["mae_hu"] for row in found["bias"].values())
    assert all(row["rmse_hu"] == 0 for row in found["phase"])
    assert found["slice_to_slice"] == {"jitter_hu": 0, "roughness_ratio": 1}
    assert found["null_space"]["explained"] == pytest.approx(1)
    assert found["null_space"]["measured_rmse_hu"] == 0
    assert found["lung"]["volume_ml"] > 0
    assert found["consistency"]["ratio"] == 1
    assert found["consistency"]["rms_hu"] > 0, "both series carry noise, so even the truth does not agree exactly"
    assert found["noise"]["ratio"] == {"std_hu": 1, "mean_frequency_per_mm": 1}
    # No structure is known and no network was handed in.
    assert found["not_measured"].keys() == {"volumetry", "perceptual"}
    assert "--vgg19" in found["not_measured"]["perceptual"]


def test_interpolation_is_blurred_and_invents_less(linear: np.ndarray, case: Case) -> None:
    truth, blurred = score_method(case.truth, case, WIDE), score_method(linear, case, WIDE)
    assert blurred["sharpness_z"]["width_mm"] > 1.2 * truth["sharpness_z"]["width_mm"]
    assert blurred["slice_to_slice"]["roughness_ratio"] < 0.8
    assert blurred["null_space"]["energy_ratio"] < 0.9


def test_a_volume_that_disagrees_with_the_thick_slices_has_a_ratio_above_one(linear: np.ndarray, case: Case) -> None:
    assert case.operator is not None
    assert case.thick is not None
    raised = score_method(case.truth + 30, case, WIDE)["consistency"]
    rows = case.operator.matrix[case.operator.covered]
    residual = np.einsum("kz,zyx->kyx", rows, case.truth + 30.0) - case.thick[case.operator.covered]
    assert raised["rms_hu"] == pytest.approx(np.sqrt(np.mean(residual**2)), rel=1e-5), "float32 columns"
    assert raised["ratio"] == pytest.approx(raised["rms_hu"] / raised["truth_rms_hu"])
    bound = score_method(linear, case, WIDE, whole_range=False)["not_measured"]
    assert "beyond the window" in bound["consistency"], "a latent clipped to its window cannot be judged outside it"


def test_a_shift_of_two_slices_costs_about_three_db(linear: np.ndarray, case: Case) -> None:
    moved = np.concatenate([linear[2:], linear[-1:], linear[-1:]])
    assert 1.5 < psnr(linear, case) - psnr(moved, case) < 5


def test_a_wrong_hu_scale_is_caught(linear: np.ndarray, case: Case) -> None:
    unscaled = linear + 1024  # RescaleIntercept never applied
    assert psnr(unscaled, case) < psnr(linear, case) - 10
    bias = score("k", "APE", case.truth, {"m": linear * 1.1}, WIDE).scores["m"]["bias"]
    assert bias["lung"]["bias_hu"] == pytest.approx(-85, abs=15), "a gain shows as a bias that grows with HU"


def test_swapped_axes_are_caught(case: Case) -> None:
    assert psnr(np.swapaxes(case.truth, 1, 2), case) < 15
    assert psnr(case.truth[::-1], case) < 25
    lying = score("k", "APE", case.truth, {"m": np.swapaxes(case.truth, 0, 1)}, SOFT)
    assert "equal shapes" in lying.failures["m"]


def test_a_dropped_slice_is_caught(case: Case) -> None:
    found = score("k", "APE", case.truth, {"m": np.delete(case.truth, 10, axis=0)}, SOFT)
    assert "shape" in found.failures["m"]
    padded = np.concatenate([np.delete(case.truth, 10, axis=0), case.truth[-1:]])
    assert psnr(padded, case) < 40, "filled up to the right length, every slice after it is off by one"


def test_a_wrong_slice_operator_is_caught(pair: tuple[Volume, Volume], case: Case) -> None:
    thick = pair[0]
    assert case.geometry is not None
    thick_z, thin_z = np.array(thick.geometry.z_mm), np.array(case.geometry.z_mm)
    wrong = SliceProfile("box", 2.5 * thick.geometry.spacing_mm_zyx[0])
    assert check_operator(case.truth, thick.hu, thick_z, thin_z, wrong, 5.0).verdict != "agrees"
    own = score_method(case.truth + 20.0 * (np.arange(len(case.truth)) % 2)[:, None, None], case, WIDE)
    assert own["slice_to_slice"]["jitter_hu"] > 10, "banding shows although most of it averages out in thick slices"


def test_bad_methods_are_said_by_name_and_never_averaged(case: Case, linear: np.ndarray) -> None:
    broken = linear.copy()
    broken[3, 4, 5] = np.nan
    scored = score("k1", "APE", case.truth, {"linear": linear, "model": broken, "same": case.truth}, SOFT)
    assert "1 non-finite voxels" in scored.failures["model"]
    fine = score("k2", "non-APE", case.truth, {"linear": linear, "model": linear}, SOFT)
    summary = summarise([scored, fine, failed("k3", "APE", "p3", "the thin series cannot be read")])
    assert summary["methods"]["model"]["cases"] == 1
    assert summary["methods"]["model"]["psnr_db"] == pytest.approx(fine.scores["linear"]["psnr_db"])
    assert summary["methods"]["same"]["psnr_db"] is None
    assert summary["methods"]["same"]["identical"] == 1
    assert set(summary["failures"]) == {"k1", "k3"}
    assert summary["by_category"]["APE"]["cases"] == 2
    assert np.isfinite(json.loads(json.dumps(finite(summary), allow_nan=False))["methods"]["linear"]["psnr_db"])


def test_means_are_by_patient_and_differences_paired() -> None:
    def made(key: str, patient: str, model: float) -> CaseScores:
        rows = {
            name: {"psnr_db": value, "identical": False, "ssim": 0.9, "mae_hu": 5.0}
            for name, value in (("cubic", 30.0), ("cubic_consistent", 30.5), ("model", model))
        }
        rows["model"]["ssim"] = 0.91
        return CaseScores(key, "APE", 10, rows, {}, {}, patient)

    cases = [made("a1", "a", 31.0), made("a2", "a", 35.0), made("b", "b", 30.0), made("c", "c", 33.0)]
    summary = summarise(cases)
    assert (summary["cases"], summary["patients"]) == (4, 3)
    assert summary["methods"]["model"]["psnr_db"] == pytest.approx((33 + 30 + 33) / 3)
    assert summary["against_cubic"]["model"]["mean"] == pytest.approx(2.0)
    assert summary["against_cubic"]["model"]["low"] >= 0.0
    gain = summary["against_consistent"]["model"]
    assert gain["psnr_db"]["mean"] == pytest.approx(1.5), "what the consistency step gives alone is no model's merit"
    assert gain["ssim"]["mean"] == pytest.approx(0.01)
    assert "cubic_consistent" not in summary["against_consistent"]


def test_constant_slices_are_noted_and_a_narrow_window_leaves_lung_out(case: Case, linear: np.ndarray) -> None:
    truth = case.truth.copy()
    truth[:2] = -1000
    scored = score("k", "APE", truth, {"linear": linear}, SOFT)
    assert scored.notes == (f"2 of {len(truth)} true slices are constant",)
    narrow = score_method(linear, case, SOFT)
    assert "holds lung" in narrow["not_measured"]["lung"]


def test_extents_that_do_not_meet_are_refused(case: Case) -> None:
    geometry = case.geometry
    assert isinstance(geometry, Geometry)
    far = replace(geometry, z_mm=tuple(z + 1e4 for z in geometry.z_mm))
    with pytest.raises(InputError, match="0 thin slices"):
        common_slices(geometry, far)
