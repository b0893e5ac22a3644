"""Whether a series is what a shipped model was trained for: refused, or flagged by name with what to do."""

from __future__ import annotations

import re

import numpy as np

from latentcache import InputError
from pipeline.reading import AIR_HU
from pipeline.refiner import PretrainedCard, outside
from pipeline.volume import Geometry, Volume

BODY_HU = -300
EDGE_SHARE = 0.3
"""Share of the outermost pixels inside the body from which on the field of view is reported as cropped."""
KERNELS = ("soft",)
"""Kernels that a card which names none is taken to know."""
_SHARP = re.compile(r"LUNG|BONE|EDGE|SHARP|ULTRA|HRC|^F[CL][58]\d|^[BDHIJSTU][a-z]?[6-9]\d|^Y[A-E]", re.I)

FLAGS = {
    "gantry-tilt": "the gantry was tilted: the thin slices keep its shear; judge angles and volumes on the source",
    "gaps-between-slices": "gaps between the thick slices: what lies in them was not measured and is a guess",
    "lossy-compressed": "lossily compressed source: its artefacts are taken for anatomy; prefer the original",
    "mixed-thickness": "slices of several thicknesses in one series: one profile is assumed; split the series",
}


def check_suitable(thick: Volume, card: PretrainedCard, target: Geometry, *, stated: bool = True) -> tuple[str, ...]:
    """Everything about a series that speaks against trusting its thin slices, each with what to do.

    Args:
        stated: Whether the source states its slice thickness and what was measured, as DICOM does and NIfTI does not.

    Raises:
        InputError: Values that are no HU.
    """
    low, high = float(thick.hu.min()), float(thick.hu.max())
    if low > AIR_HU:
        raise InputError(
            f"values from {low:.0f} to {high:.0f}, none of them air",
            expected="Hounsfield units over a whole field of view (air is -1000)",
            remedy="MR, PET and uncalibrated cone-beam CT cannot be interpolated; give CT in HU, not cropped to the "
            "inside of the body.",
        )
    found = [
        f"{text}: outside of what the model's card states; compare with plain interpolation before you trust it"
        for text in outside(card, thick.geometry, target)
    ]
    if not stated:
        found.append(
            "NIfTI states no slice thickness: that of the spacing is assumed; give --fwhm-mm where slices overlap"
        )
    elif thick.geometry.thickness_mm <= 0:
        found.append("the header states no slice thickness: that of the spacing is assumed; give --fwhm-mm")
    if cropped(thick):
        found.append("the body reaches the image's border: the field of view is cropped; distrust the outermost pixels")
    known = card.raw.get("trained_for", {}).get("kernels", KERNELS)
    kernel = str(thick.header.public.get("ConvolutionKernel", ""))
    if kernel_class(kernel) not in ("", *known):
        found.append(f"kernel {kernel}: a sharp one, which the model's card does not state; take a soft reconstruction")
    return (*found, *(text for flag, text in FLAGS.items() if flag in thick.flags))


def cropped(thick: Volume) -> bool:
    """Whether the body is cut by the image's border, as far as its outermost pixels tell."""
    hu = thick.hu
    edge = np.concatenate([hu[:, 0], hu[:, -1], hu[:, :, 0], hu[:, :, -1]], axis=1)
    return bool((edge > BODY_HU).mean() > EDGE_SHARE)


def kernel_class(kernel: str) -> str:
    """``sharp`` or ``soft`` by the vendors' spelling of a reconstruction kernel; empty where there is none."""
    if not kernel:
        return ""
    return "sharp" if any(_SHARP.search(part) for part in kernel.split("\\")) else "soft"
