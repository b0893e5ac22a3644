"""Perceptual distance: how far two volumes lie apart in the features of a network that is handed in.

The distance is that of LPIPS (Zhang et al. 2018, eq. 1) with every learnt channel weight set to 1: features are scaled
to unit length across channels at every place, their squared differences summed over channels, averaged over places and
summed over layers. With VGG19 it is no published LPIPS figure: compare it within one table only. Training may use
another distance on the same features (mean absolute difference), so that a model is not graded by its training loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import InputError
from pipeline.metrics.intensity import check
from pipeline.volume import Window

FeaturesOf = Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]]
"""One grey image (y, x) in [-1, 1] to feature maps (channels, y, x), finest first."""
PLANES = 8
"""Axial slices, and as many coronal planes, that are looked at: evenly spread over the middle nine tenths."""
LEAST_SIDE = 16
EPSILON = 1e-10


def image_distance(first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]]) -> float:
    """Distance of two images from their feature maps; 0 for equal ones, at most 4 a layer."""
    total = 0.0
    for a, b in zip(first, second, strict=True):
        total += float(np.mean(np.sum((_unit(a) - _unit(b)) ** 2, axis=0)))
    return total


def perceptual_distance(
    prediction: NDArray[Any], truth: NDArray[Any], window: Window, features: FeaturesOf | None
) -> dict[str, float]:
    """Mean distance over axial slices and over coronal planes, which show what happens along z.

    Args:
        prediction, truth: (z, y, x) HU.

    Raises:
        InputError: No features were handed in, or planes of fewer than 16 voxels a side.
    """
    check(prediction, truth)
    if features is None:
        raise InputError(
            "no network for the perceptual distance",
            expected="the state dict of torchvision's vgg19",
            remedy="Name it: ctpipe evaluate --vgg19 vgg19.pth.",
        )
    if min(truth.shape) < LEAST_SIDE:
        raise InputError(
            f"a volume of {truth.shape}", expected=f"at least {LEAST_SIDE} voxels a side", remedy="Use another metric."
        )

    def mean(planes: Callable[[NDArray[Any], int], NDArray[Any]], count: int) -> float:
        found = []
        for k in np.unique(np.linspace(0.05 * (count - 1), 0.95 * (count - 1), PLANES).round().astype(int)):
            images = (window.to_unit(planes(v, int(k))) for v in (prediction, truth))
            found.append(image_distance(*(features(image) for image in images)))
        return float(np.mean(found))

    return {
        "axial": mean(lambda v, k: v[k], truth.shape[0]),
        "coronal": mean(lambda v, k: v[:, k], truth.shape[1]),
    }


def _unit(features: NDArray[Any]) -> NDArray[np.float64]:
    f = features.astype(np.float64)
    return np.asarray(f / np.sqrt(np.sum(f**2, axis=0, keepdims=True) + EPSILON))
