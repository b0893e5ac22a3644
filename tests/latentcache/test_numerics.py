"""The arithmetic behind a latent: its name in the encode key, TF32, and convolutions that are wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from latentcache import (
    InputError,
    check_bf16_convolutions,
    compute_dtype,
    device_kind,
    dtype_for_latents,
    full_float32,
    numerics,
)
from latentcache.numerics import check_cudnn_version, check_large_convolution

SMALL = (8, 4, 12, 12)


@pytest.fixture(autouse=True)
def measured_anew() -> None:
    check_large_convolution.cache_clear()


def test_auto_is_bf16_on_a_gpu_and_float32_on_a_cpu() -> None:
    assert [compute_dtype("auto", device) for device in ("cpu", "cuda", "cuda:3")] == ["float32"] + 2 * ["bfloat16"]
    assert (compute_dtype("fp32", "cuda:1"), compute_dtype("bf16", "cpu")) == ("float32", "bfloat16")
    assert device_kind("cuda:7") == "cuda"
    with pytest.raises(InputError, match=r"--dtype fp16; expected auto, fp32, bf16"):
        compute_dtype("fp16", "cpu")


@pytest.mark.parametrize(
    ("latents", "device", "precision", "expected"),
    [
        (("float32", "cuda"), "cuda:1", "auto", "float32"),
        (("bfloat16", "cuda"), "cuda", "auto", "bfloat16"),
        (("float32", "cpu"), "cuda", "auto", "bfloat16"),
        (("bfloat16", "cuda"), "cpu", "auto", "float32"),
        (("float32", "cuda"), "cuda", "bf16", "bfloat16"),
        (("bfloat16", "cuda"), "cuda", "fp32", "float32"),
    ],
)
def test_a_vae_computes_as_its_latents_were_computed_unless_asked(
    latents: tuple[str, str], device: str, precision: str, expected: str
) -> None:
    encoding = SimpleNamespace(compute_dtype=latents[0], device_kind=latents[1])
    assert dtype_for_latents(precision, device, cast(Any, encoding)) == expected
    with pytest.raises(InputError, match="--dtype half"):
        dtype_for_latents("half", device, cast(Any, encoding))


@pytest.mark.parametrize("version", [90800, 91002, 91400, 91401])
def test_a_cudnn_whose_convolutions_are_wrong_is_refused_with_what_to_install(version: int) -> None:
    with pytest.raises(InputError, match=r"cuDNN 9\.\d+\.\d.*nvidia-cudnn-cu1\d.*>=9\.15.*--dtype fp32"):
        check_cudnn_version(version)


@pytest.mark.parametrize("version", [None, 90701, 91500, 92000])
def test_other_versions_are_accepted(version: int | None) -> None:
    check_cudnn_version(version)


def test_a_right_convolution_passes_the_comparison() -> None:
    error = check_large_convolution(torch.device("cpu"), SMALL)
    assert 0 < error < 0.05, "bf16 rounds, and no more than that"


def test_a_convolution_that_is_wrong_in_its_last_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.nn.functional.conv3d

    def wrong_at_the_end(x: Any, *arguments: Any, **options: Any) -> Any:
        out = real(x, *arguments, **options)
        if x.dtype == torch.bfloat16:
            out[:, :, -1, -2:] = 0
        return out

    monkeypatch.setattr(torch.nn.functional, "conv3d", wrong_at_the_end)
    with pytest.raises(InputError, match="bf16 3-D convolution on cpu that is off by"):
        check_large_convolution(torch.device("cpu"), SMALL)


def test_a_cpu_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(numerics, "check_large_convolution", fail)
    check_bf16_convolutions(torch.device("cpu"))


def test_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        full_float32()
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.cuda
def test_this_gpu_convolves_large_slabs_rightly() -> None:
    check_bf16_convolutions(torch.device("cuda"))
