"""RPLHR-CT's protocol on volumes made to its form, against its formulae computed another way."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from latentcache import InputError
from pipeline.evaluation import find_cases
from pipeline.evaluation.rplhr import evaluate_case, from_hu, lattices, protocol_scores, read_nifti, to_hu
from pipeline.forward_model import SliceProfile, weights
from pipeline.volume import Volume


def made(n_thick: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(thick, thin) stored values: thick slice k is thin slice 5k averaged with its neighbours."""
    rng = np.random.default_rng(seed)
    thin = 0.35 + 0.02 * np.cumsum(rng.normal(0, 1, (5 * (n_thick - 1) + 1, 24, 30)), axis=0)
    padded = np.pad(thin, ((2, 2), (0, 0), (0, 0)), mode="edge")
    thick = np.stack([padded[5 * k : 5 * k + 5].mean(0) for k in range(n_thick)])
    return np.clip(thick, 0, 1).astype(np.float32), np.clip(thin, 0, 1).astype(np.float32)


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([0.7, 0.6, 1.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), affine), path)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    for i in range(2):
        thick, thin = made(seed=i)
        save(tmp_path / "test" / "5mm" / f"CT{i}.nii.gz", thick)
        save(tmp_path / "test" / "1mm" / f"CT{i}.nii.gz", thin)
    return tmp_path


def test_files_come_back_in_zyx_with_their_spacing(dataset: Path) -> None:
    values, pixel = read_nifti(dataset / "test" / "5mm" / "CT0.nii.gz")
    assert values == pytest.approx(made()[0])
    assert pixel == pytest.approx((0.6, 0.7))


def test_thick_k_lies_on_thin_5k() -> None:
    thick, thin = lattices(7, 31, 4, 4, (1.0, 1.0))
    nearest = weights("nearest", np.array(thick.z_mm), np.array(thin.z_mm), SliceProfile("box", 5.0))
    for k in range(7):
        assert nearest[5 * k, k] == 1
    assert nearest[6, 1] == 1
    assert nearest[8, 2] == 1
    with pytest.raises(InputError, match="31 thin slices"):
        lattices(7, 35, 4, 4, (1.0, 1.0))


def test_an_answer_on_the_wrong_alignment_loses(dataset: Path) -> None:
    found = evaluate_case(find_cases(dataset, "test")[0])
    stored, truth = made()
    shifted = weights("linear", 2.0 + 5 * np.arange(7.0), np.arange(31.0), SliceProfile("box", 5.0))
    wrong = np.tensordot(shifted, stored, 1)
    assert protocol_scores(wrong, truth)["psnr_db"] < found.scores["linear"]["psnr_db"] - 1.5


def test_figures_are_the_published_formulae() -> None:
    _, truth = made()
    prediction = np.clip(truth + np.random.default_rng(1).normal(0, 0.03, truth.shape), 0, 1).astype(np.float32)
    found = protocol_scores(prediction, truth)
    p, t = (torch.from_numpy(v[5:-5]).double() for v in (prediction, truth))
    assert found["psnr_db"] == pytest.approx(20 * math.log10(1 / math.sqrt(float(((p - t) ** 2).mean()))), abs=1e-6)
    line = torch.tensor([math.exp(-((x - 5) ** 2) / 4.5) for x in range(11)], dtype=torch.float64)
    window = torch.outer(line / line.sum(), line / line.sum())[None, None]

    def mean(v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(v[:, None], window, padding=5)

    a, b = mean(p), mean(t)
    va, vb, cov = mean(p * p) - a * a, mean(t * t) - b * b, mean(p * t) - a * b
    index = (2 * a * b + 1e-4) * (2 * cov + 9e-4) / ((a * a + b * b + 1e-4) * (va + vb + 9e-4))
    assert found["ssim"] == pytest.approx(float(index.mean()), abs=1e-6)
    assert found["mae_hu"] == pytest.approx(3072 * float((p - t).abs().mean()), rel=1e-6)


def test_the_five_slices_at_each_end_do_not_count() -> None:
    _, truth = made()
    prediction = np.clip(truth + 0.01, 0, 1)
    inner = protocol_scores(prediction, truth)
    spoilt = prediction.copy()
    spoilt[:5], spoilt[-5:] = 0, 1
    assert protocol_scores(spoilt, truth) == inner
    spoilt[5] = 0
    assert protocol_scores(spoilt, truth)["psnr_db"] < inner["psnr_db"]


def test_identical_is_said_and_hu_go_both_ways() -> None:
    _, truth = made()
    found = protocol_scores(truth, truth)
    assert found["psnr_db"] is None
    assert found["identical"]
    assert from_hu(to_hu(truth)) == pytest.approx(truth, abs=1e-6)
    assert to_hu(np.float32([0.0, 1.0])).tolist() == [-1024.0, 2048.0]


def test_a_model_is_scored_beside_the_baselines(dataset: Path) -> None:
    def generate(thick: Volume, thin: object) -> np.ndarray:
        return to_hu(made()[1]) + 31.0

    scores = evaluate_case(find_cases(dataset, "test")[0], {"model": generate}).scores
    assert set(scores) == {"nearest", "linear", "cubic", "lanczos", "cubic_back_projection", "model"}
    assert scores["model"]["psnr_db"] == pytest.approx(20 * math.log10(3072 / 31), abs=0.1)


def test_what_is_missing_or_broken_is_said_by_case(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no volumes"):
        find_cases(dataset, "val")
    (dataset / "test" / "1mm" / "CT1.nii.gz").unlink()
    (dataset / "test" / "1mm" / "CT0.nii.gz").write_bytes(b"no nifti")
    for case in find_cases(dataset, "test"):
        found = evaluate_case(case)
        assert found.scores == {}
        assert "cannot be read" in found.failures["case"]
        assert "CT" not in found.failures["case"], "no file names"
    with pytest.raises(InputError, match="9 thin slices"):
        protocol_scores(np.zeros((9, 12, 12)), np.zeros((9, 12, 12), np.float32))
