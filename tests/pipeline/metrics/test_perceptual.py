"""The perceptual distance against torchmetrics' LPIPS arithmetic, and VGG19's features against plain convolutions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion.losses import VGG19Features
from latentcache import InputError, NonFiniteError
from pipeline.metrics import perceptual_distance
from pipeline.metrics.perceptual import image_distance
from pipeline.volume import Window
from pipeline.workflows.evaluate import features_of

WINDOW = Window()


def maps(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1, (c, s, s)).astype(np.float32) for c, s in ((8, 24), (16, 12), (32, 6))]


def test_the_distance_is_that_of_lpips_without_learnt_weights() -> None:
    from torchmetrics.functional.image.lpips import _normalize_tensor, _spatial_average

    a, b = maps(0), maps(1)
    expected = 0.0
    for x, y in zip(a, b, strict=True):
        units = [_normalize_tensor(torch.from_numpy(v)[None].double()) for v in (x, y)]
        expected += float(_spatial_average(((units[0] - units[1]) ** 2).sum(dim=1, keepdim=True)))
    assert image_distance(a, b) == pytest.approx(expected, abs=1e-6)


def test_closed_forms_of_the_distance() -> None:
    a = maps(0)
    assert image_distance(a, a) == 0
    assert image_distance(a, [3 * v for v in a]) == pytest.approx(0, abs=1e-9), "length does not matter"
    assert image_distance(a, [-v for v in a]) == pytest.approx(4 * len(a)), "opposite features are farthest apart"


def gradient(unit: np.ndarray) -> list[np.ndarray]:
    """Two channels of a made-up network: the image's own differences, and a constant."""
    return [np.stack([np.gradient(unit)[0], np.gradient(unit)[1], np.full_like(unit, 0.1)])]


def test_planes_along_z_show_what_axial_slices_do_not() -> None:
    truth = np.random.default_rng(0).normal(40, 60, (32, 24, 20))
    assert perceptual_distance(truth, truth, WINDOW, gradient) == {"axial": 0.0, "coronal": 0.0}
    steps = np.repeat(truth[::4], 4, axis=0)
    steps[[0, 4, 8, 12, 16, 20, 24, 28]] = truth[::4]
    found = perceptual_distance(steps, truth, WINDOW, gradient)
    assert found["coronal"] > 0.05


def test_what_cannot_be_measured_is_said() -> None:
    truth = np.zeros((20, 20, 20))
    with pytest.raises(InputError, match="--vgg19"):
        perceptual_distance(truth, truth, WINDOW, None)
    with pytest.raises(InputError, match="at least 16"):
        perceptual_distance(truth[:12], truth[:12], WINDOW, gradient)
    broken = truth.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError):
        perceptual_distance(broken, truth, WINDOW, gradient)


def test_features_of_a_state_dict_are_vgg19s(tmp_path: Path) -> None:
    """With random weights: five maps, equal to convolutions written out one after the other."""
    torch.manual_seed(0)
    state = VGG19Features().state_dict()
    torch.save(state, tmp_path / "vgg19.pth")
    features, sha256 = features_of(tmp_path / "vgg19.pth", "cpu")
    unit = np.random.default_rng(1).uniform(-1, 1, (32, 32)).astype(np.float32)
    x = (torch.from_numpy(unit)[None, None].expand(1, 3, -1, -1) + 1) / 2
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    wanted, at = [], 0
    for convolutions in (2, 2, 4, 4, 4):
        for _ in range(convolutions):
            x = F.relu(F.conv2d(x, state[f"features.{at}.weight"], state[f"features.{at}.bias"], padding=1))
            at += 2
        wanted.append(x)
        x, at = F.max_pool2d(x, 2), at + 1
    found = features(unit)
    assert len(sha256) == 64
    assert [f.shape[0] for f in found] == [64, 128, 256, 512, 512]
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b[0].numpy(), abs=1e-5)


def test_weights_that_are_none_are_refused_with_the_option_to_use(tmp_path: Path) -> None:
    assert features_of(None, "cpu") == (None, None)
    with pytest.raises(InputError, match="--vgg19"):
        features_of(tmp_path / "nothing.pth", "cpu")
