"""Image losses: MS-SSIM against torchmetrics, VGG19 against a hand-made state dict, and where gradients go."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from skimage.metrics import structural_similarity
from torch import Tensor

from diffusion.losses import DecodedPart, ImageLosses, VGG19Features, load_vgg19, ms_ssim, perceptual_distance
from diffusion.losses.ms_ssim import scales_for
from latentcache import InputError

msssim = importlib.import_module("diffusion.losses.ms_ssim")


def images(n: int, height: int, width: int, seed: int = 0) -> Tensor:
    x = torch.randn(n, 1, height // 4 + 1, width // 4 + 1, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(F.interpolate(x, scale_factor=4.0, mode="bilinear")[:, 0, :height, :width])


def test_ms_ssim_equals_torchmetrics_and_scikit_image_scale_by_scale() -> None:
    """Contrast of the four finer scales by torchmetrics; SSIM of the coarsest by scikit-image.

    torchmetrics' own MS-SSIM takes the coarsest scale's SSIM over a mirrored border, which Wang et al. do not.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    first = images(1, 192, 208)
    second = (first + 0.2 * images(1, 192, 208, seed=1)).clamp(-1, 1)
    found = float(ms_ssim(first, second, data_range=2.0))
    wanted, a, b = 1.0, first[:, None], second[:, None]
    for weight in msssim.SCALE_WEIGHTS[:-1]:
        both = structural_similarity_index_measure(b, a, data_range=2.0, sigma=1.5, return_contrast_sensitivity=True)
        wanted *= float(both[1]) ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    coarsest = structural_similarity(
        a[0, 0].numpy(), b[0, 0].numpy(), data_range=2.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert found == pytest.approx(wanted * float(coarsest) ** msssim.SCALE_WEIGHTS[-1], abs=1e-5)


@pytest.mark.parametrize(
    ("side", "scales"), [(11, 1), (20, 1), (21, 2), (80, 3), (81, 4), (160, 4), (161, 5), (512, 5)]
)
def test_scales_shrink_under_161_pixels(side: int, scales: int) -> None:
    assert scales_for(side, 600) == scales_for(600, side) == scales


def test_fewer_scales_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    msssim._said.clear()
    with caplog.at_level(logging.WARNING, "ctpipe.msssim"):
        ms_ssim(images(1, 48, 48), images(1, 48, 48, 1), data_range=2.0)
        ms_ssim(images(1, 48, 48), images(1, 48, 48, 1), data_range=2.0)
    assert [r.getMessage() for r in caplog.records] == [
        "MS-SSIM uses 3 of 5 scales: images of 48 x 48 pixels are under 161; their weights are renormalised"
    ]


def test_ms_ssim_is_one_for_equal_images_and_falls_with_noise() -> None:
    x = images(1, 64, 64)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    scores = [float(ms_ssim(x, x + a * noise, data_range=2.0)) for a in (0.0, 0.05, 0.2, 1.0)]
    assert scores[0] == pytest.approx(1.0, abs=1e-6)
    assert scores == sorted(scores, reverse=True)


def test_ms_ssim_of_opposite_images_has_a_finite_gradient() -> None:
    x = images(1, 64, 64)
    y = (-x).requires_grad_()
    (1 - ms_ssim(x, y, data_range=2.0)).sum().backward()
    assert y.grad is not None
    assert bool(torch.isfinite(y.grad).all())


def test_images_too_small_for_a_window_are_refused() -> None:
    with pytest.raises(InputError, match="11 pixels"):
        ms_ssim(images(1, 8, 40), images(1, 8, 40), data_range=2.0)


@pytest.fixture(scope="module")
def vgg() -> VGG19Features:
    torch.manual_seed(0)
    return VGG19Features()


def test_vgg19_has_the_published_shape(vgg: VGG19Features) -> None:
    """Simonyan and Zisserman, table 1, column E: 16 convolutions, 20,024,384 parameters before the classifier."""
    convolutions = [m for m in vgg.features if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 16
    assert sum(p.numel() for p in vgg.parameters()) == 20_024_384
    names = [n for n in vgg.state_dict() if n.endswith("weight")]
    indices = [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34]
    assert names == [f"features.{i}.weight" for i in indices]
    maps = vgg(images(1, 32, 48))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (64, 32, 48),
        (128, 16, 24),
        (256, 8, 12),
        (512, 4, 6),
        (512, 2, 3),
    ]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_torchvision_state_dict_loads_with_its_classifier_ignored(
    suffix: str, vgg: VGG19Features, tmp_path: Path
) -> None:
    state = {**vgg.state_dict(), "classifier.0.weight": torch.zeros(2, 2)}
    path = tmp_path / f"vgg19.{suffix}"
    if suffix == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    loaded = load_vgg19(path)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), vgg.parameters(), strict=True))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_weights_that_are_absent_or_wrong_are_said_never_skipped(vgg: VGG19Features, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"losses\.vgg19_weights"):
        load_vgg19(None)
    with pytest.raises(InputError, match="no file"):
        load_vgg19(tmp_path / "vgg19.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(InputError, match="cannot be read"):
        load_vgg19(tmp_path / "text.pth")
    short = {k: v for k, v in vgg.state_dict().items() if k != "features.34.bias"}
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(InputError, match=r"31/32 VGG19 tensors.*features\.34\.bias"):
        load_vgg19(tmp_path / "short.pth")
    with pytest.raises(InputError, match="without VGG19"):
        ImageLosses(decode, [0.0] * 4, [1.0] * 4)


def test_perceptual_distance_is_zero_for_equal_images_and_sends_gradient_to_the_prediction(vgg: VGG19Features) -> None:
    target = images(2, 32, 32)
    assert torch.equal(perceptual_distance(vgg, target, target), torch.zeros(2))
    prediction = images(2, 32, 32, seed=1).requires_grad_()
    wanted = target.clone().requires_grad_()
    distance = perceptual_distance(vgg, prediction, wanted)
    assert float(distance.detach().min()) > 0
    distance.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.any()
    assert wanted.grad is None
    with pytest.raises(InputError, match="16 pixels"):
        perceptual_distance(vgg, images(1, 8, 8), images(1, 8, 8))


def decode(latents: Tensor) -> Tensor:
    """Stands for the VAE's decoder."""
    return torch.tanh(F.interpolate(latents.mean(1, keepdim=True), scale_factor=4.0, mode="trilinear"))


SHAPE = (2, 4, 6, 8, 8)
MASK = torch.ones(2, 1, 6, 8, 8)
ALL = torch.tensor([True, True])


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (5, 6)]


def latents(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def losses(vgg: VGG19Features | None = None, **changed: float) -> ImageLosses:
    settings = {"ms_ssim_weight": 0.1, "perceptual_weight": 0.1 if vgg else 0.0, **changed}
    return ImageLosses(decode, [0.1] * 4, [0.5] * 4, vgg=vgg, part=DecodedPart(slab=3), **settings)  # type: ignore[arg-type]


def test_a_perfect_prediction_costs_nothing(vgg: VGG19Features) -> None:
    terms = losses(vgg)(latents(0), latents(0), MASK, ALL, generators())
    assert torch.allclose(terms.per_sample, torch.zeros(2), atol=1e-6)


def test_terms_are_weighted_and_bring_gradient_to_the_prediction_alone(vgg: VGG19Features) -> None:
    prediction, target = latents(0).requires_grad_(), latents(1).requires_grad_()
    terms = losses(vgg)(prediction, target, MASK, ALL, generators())
    assert torch.allclose(terms.per_sample, 0.1 * terms.ms_ssim + 0.1 * terms.perceptual)
    assert float(terms.ms_ssim.detach().min()) > 0
    assert float(terms.perceptual.detach().min()) > 0
    terms.per_sample.sum().backward()
    assert prediction.grad is not None
    assert target.grad is None
    touched = prediction.grad.abs().amax(dim=(1, 3, 4)) > 0
    assert touched.sum(1).tolist() == [3, 3], "a slab of three latent slices each"


def test_a_sample_does_not_depend_on_its_batch_mates(vgg: VGG19Features) -> None:
    together = losses(vgg)(latents(0), latents(1), MASK, ALL, generators())
    for b in range(2):
        part = slice(b, b + 1)
        alone = losses(vgg)(latents(0)[part], latents(1)[part], MASK[part], ALL[part], generators()[part])
        assert torch.allclose(alone.per_sample[0], together.per_sample[b])


def test_meaningless_predictions_are_left_out_and_said_so() -> None:
    prediction = latents(0).requires_grad_()
    terms = losses()(prediction, latents(1), MASK, torch.tensor([False, True]), generators())
    assert terms.used.tolist() == [False, True]
    first, second = terms.per_sample.tolist()
    assert first == 0
    assert second > 0
    terms.per_sample.sum().backward()
    assert prediction.grad is not None
    assert not prediction.grad[0].any()


def test_padding_is_no_part_of_the_image_losses() -> None:
    mask = MASK.clone()
    mask[:, :, :, :, 6:] = 0
    spoiled = latents(0)
    spoiled[:, :, :, :, 6:] = 50.0
    plain = losses()(latents(0), latents(1), mask, ALL, generators())
    assert torch.equal(losses()(spoiled, latents(1), mask, ALL, generators()).per_sample, plain.per_sample)


def test_a_fifth_of_the_slices_goes_through_vgg19() -> None:
    class Counting(VGG19Features):
        seen: list[int] = []  # noqa: RUF012

        def forward(self, unit_NHW: Tensor) -> list[Tensor]:
            self.seen.append(len(unit_NHW))
            return super().forward(unit_NHW)

    torch.manual_seed(0)
    counting = Counting()
    ImageLosses(decode, [0.0] * 4, [1.0] * 4, vgg=counting, part=DecodedPart(slab=5))(
        latents(0), latents(1), MASK, ALL, generators()
    )
    assert counting.seen == [4, 4, 4, 4], "4 of 20 decoded slices, target and prediction, for two samples"


@pytest.mark.parametrize("wrong", [{"slice_fraction": 0.0}, {"slab": 0}, {"crop": 2}])
def test_settings_that_leave_nothing_to_look_at_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="fraction"):
        ImageLosses(decode, [0.0] * 4, [1.0] * 4, perceptual_weight=0, part=DecodedPart(**wrong))  # type: ignore[arg-type]
