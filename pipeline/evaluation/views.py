"""Views of a scored case: slices, error maps and spreads, coded as 8-bit images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.volume import Geometry

VIEWER_VOXELS = 3_000_000
"""Voxels a volume keeps in the page, so that three cases of six volumes stay under 15 MB."""
SPREAD_STEP_HU = 0.5
"""HU a code of the uncertainty volume, which is companded linearly (0 to 127 HU)."""
ALARM_STEP = 0.1
"""Of the alarm, in a code and in a kept volume: 0 to 25."""


# Companding of HU to 8 bits: fine where soft tissue is judged, coarse in air and bone. Knots (HU, code).
CODE_KNOTS_HU = (-1024.0, -250.0, 350.0, 2000.0)
CODE_KNOTS = (0.0, 40.0, 215.0, 255.0)


METHOD_LABELS = {
    "nearest": "Nearest slice",
    "linear": "Linear interpolation",
    "cubic": "Cubic interpolation",
    "lanczos": "Lanczos interpolation",
    "cubic_back_projection": "Cubic with back-projection",
    "cubic_consistent": "Cubic made consistent",
    "regression": "Regression network",
    "refined": "Refined, made consistent",
    "condition_round_trip": "VAE round trip of the condition",
    "model": "ctpipe model",
    "vae_ceiling": "VAE round trip of the truth (ceiling)",
    "truth": "True thin series",
    "sample": "One sample of the model",
    "uncertainty": "Spread of samples",
    "alarm": "Fabrication alarm",
    "thick": "Thick series",
}


@dataclass(frozen=True)
class CaseView:
    """Volumes of one case for the viewer, all on one grid (z, y, x) in HU (the alarm in its steps), the spacing in mm.

    ``towards`` has a letter an axis: where in the patient its index grows to, e.g. ``HPL``; empty where nobody knows.
    """

    key: str
    spacing_mm_zyx: tuple[float, float, float]
    volumes: Mapping[str, NDArray[Any]]
    towards: str = ""

    @property
    def encoded_voxels(self) -> int:
        """Of all volumes, as the page keeps them."""
        depth, rows, columns = (int(n) for n in next(iter(self.volumes.values())).shape)
        stride = view_stride((depth, rows, columns))
        return len(self.volumes) * depth * -(-rows // stride) * -(-columns // stride)


def towards(geometry: Geometry) -> str:
    """Return where z, y and x grow to: left, right, posterior, anterior, head or feet (PS3.3 C.7.6.1.1.1)."""
    letters = ""
    for axis in range(3):
        step = geometry.affine[:3, axis]
        along = int(np.argmax(np.abs(step)))
        letters += ("LPH" if step[along] > 0 else "RAF")[along]
    return letters


def label(method: str) -> str:
    """A method's name for people."""
    return METHOD_LABELS.get(method, method)


def ordered(methods: Iterable[str]) -> list[str]:
    """Methods in the order of the tables: simple to elaborate, unknown ones last."""
    known = list(METHOD_LABELS)
    return sorted(methods, key=lambda name: (known.index(name) if name in known else len(known), name))


def view_stride(shape_zyx: tuple[int, ...]) -> int:
    """In-plane step at which a volume has at most ``VIEWER_VOXELS``."""
    stride = 1
    while shape_zyx[0] * -(-shape_zyx[1] // stride) * -(-shape_zyx[2] // stride) > VIEWER_VOXELS:
        stride += 1
    return stride
