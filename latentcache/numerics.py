"""The arithmetic behind a latent: its dtype and the kind of device, and the library faults that make it wrong.

PyTorch is imported where it is needed, so that a store can be read without it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from latentcache.errors import InputError

if TYPE_CHECKING:
    import torch


class Computed(Protocol):
    """A statement of the arithmetic that latents were computed in, such as an `Encoding`."""

    @property
    def compute_dtype(self) -> str: ...
    @property
    def device_kind(self) -> str: ...


log = logging.getLogger("ctpipe.kernels")

TRITON_SWITCH = "CTPIPE_TRITON"
"""Environment variable: 0 keeps to PyTorch's operations."""
Precision = Literal["auto", "fp32", "bf16"]
PRECISIONS: tuple[Precision, ...] = ("auto", "fp32", "bf16")


CUDNN_WRONG = (90800, 91500)
"""cuDNN 9.8 to 9.14, as ``torch.backends.cudnn.version()`` counts: 3-D convolutions in bf16 with large outputs are
silently wrong (pytorch issues 163539 and 166122), or several times slower and hungrier where PyTorch goes around cuDNN
(166643)."""


SLAB_CDHW = (64, 8, 512, 512)
"""A slab as the VAE's finest level has them."""


def device_kind(device: str) -> str:
    """``cpu`` or ``cuda`` of a device such as ``cuda:3``."""
    return device.split(":")[0]


def compute_dtype(precision: str, device: str) -> str:
    """The dtype that a precision means on a device: ``auto`` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        InputError: An unknown precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--dtype {precision}", expected=", ".join(PRECISIONS), remedy="Leave it out: auto.")
    if precision == "auto":
        return "bfloat16" if device_kind(device) == "cuda" else "float32"
    return {"fp32": "float32", "bf16": "bfloat16"}[precision]


def dtype_for_latents(precision: str, device: str, latents: Computed) -> str:
    """The dtype that a VAE computes in beside stored latents.

    With ``auto`` the latents' own where the device is of
    their kind, else the device's; ``fp32`` and ``bf16`` ask for another.

    Raises:
        InputError: An unknown precision.
    """
    if precision == "auto" and device_kind(device) == latents.device_kind:
        return latents.compute_dtype
    return compute_dtype(precision, device)


def full_float32() -> None:
    """Let float32 on a GPU be float32, for this process.

    By default convolutions there round to TF32's ten bits, which is a thousandth and as much as two device kinds may
    differ by.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def check_bf16_convolutions(device: torch.device) -> None:
    """Refuse a GPU whose bf16 3-D convolutions are known, or found, to be wrong. About two seconds, once per process.

    Raises:
        InputError: The cuDNN version, or the error that was measured, and what to install.
    """
    if device.type == "cuda":
        import torch

        check_cudnn_version(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        check_large_convolution(device)


def check_cudnn_version(version: int | None) -> None:
    """Refuse a cuDNN that computes bf16 3-D convolutions wrongly (``CUDNN_WRONG``)."""
    low, high = CUDNN_WRONG
    if version is not None and low <= version < high:
        raise InputError(
            f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100}, whose bf16 3-D convolutions of large "
            "outputs are silently wrong, or several times slower",
            expected="cuDNN 9.15 or newer (or older than 9.8)",
            remedy="pip install 'nvidia-cudnn-cu13>=9.15' (nvidia-cudnn-cu12 for a torch of CUDA 12), or compute in "
            "float32: --dtype fp32, and --set optimiser.precision=fp32 for training.",
        )


@lru_cache(maxsize=16)
def check_large_convolution(device: torch.device, shape_cdhw: tuple[int, int, int, int] = SLAB_CDHW) -> float:
    """Convolve one large slab in bf16 and in float32 and compare; returns the error relative to the outputs' spread.

    Raises:
        InputError: They differ by more than bf16's rounding explains.
    """
    import torch

    channels = shape_cdhw[0]
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn((1, *shape_cdhw), generator=random, device=device, dtype=torch.bfloat16)
    weight = torch.randn((channels, channels, 3, 3, 3), generator=random, device=device) / (27 * channels) ** 0.5
    weight = weight.to(torch.bfloat16)
    error = 0.0
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        layout = torch.channels_last_3d
        half: Any = torch.nn.functional.conv3d(x.contiguous(memory_format=layout), weight, padding=1)
        # In rows of slices: a float32 slab beside the bf16 one would double what the check takes.
        for z in range(shape_cdhw[1]):
            part = torch.nn.functional.pad(x[:, :, max(0, z - 1) : z + 2].float(), (1, 1, 1, 1))
            kernel = weight.float()[:, :, max(0, 1 - z) : 3 - max(0, z + 2 - shape_cdhw[1])]
            exact = torch.nn.functional.conv3d(part, kernel)[:, :, 0]
            error = max(error, float((half[:, :, z].float() - exact).abs().max()))
    if not error < 0.1:
        raise InputError(
            f"a bf16 3-D convolution on {device} that is off by {error:.3g} where its outputs have a spread of 1",
            expected="less than 0.1: bf16's rounding",
            remedy="Update cuDNN and the driver, or compute in float32: --dtype fp32, and --set "
            "optimiser.precision=fp32 for training.",
        )
    return error


def linear_neighbours(
    z_from: NDArray[np.float64], z_to: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return for each wanted position the slices below and above it and the weight of the one above, 0 to 1.

    The one rule by which volumes and latents are interpolated along z. Beyond the ends the end slice is held.

    Args:
        z_from: (d,) ascending positions, at least one.
        z_to: (e,) positions wanted, in the same unit.
    """
    last = len(z_from) - 1
    above = np.clip(np.searchsorted(z_from, z_to, side="right"), 1, max(last, 1))
    below = above - 1
    above = np.minimum(above, last)
    distance = np.where(above > below, z_from[above] - z_from[below], 1.0)
    weight = np.clip((z_to - z_from[below]) / distance, 0.0, 1.0) * (above > below)
    return below, above, weight


def triton_agrees(index: int, largest_difference: Callable[[torch.device], float], without: str) -> bool:
    """Return whether Triton is there and its kernels agree with PyTorch on a GPU; the log says why they do not.

    Args:
        index: Of the CUDA device.
        largest_difference: Runs the kernels on a device; their largest relative difference from PyTorch's operations.
        without: What runs by PyTorch's operations where Triton is missing, for the log.
    """
    import torch

    if os.environ.get(TRITON_SWITCH) == "0":
        log.info("Triton kernels are off (%s=0)", TRITON_SWITCH)
        return False
    if importlib.util.find_spec("triton") is None:
        log.info("Triton is not installed: %s by PyTorch's operations, which is slower", without)
        return False
    try:
        wrong = largest_difference(torch.device("cuda", index))
    except Exception as error:  # noqa: BLE001 - compilers and drivers fail in many ways; PyTorch's path remains
        why = f"{type(error).__name__}: {error}"
        log.warning("Triton kernels do not run here (%s); PyTorch's operations instead", why)
        return False
    if not wrong < 1e-3:
        log.warning("Triton kernels are off by %.1e here; PyTorch's operations instead", wrong)
        return False
    return True
