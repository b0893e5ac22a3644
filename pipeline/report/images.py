"""Volumes in a page: companded to 8 bits, every slice on one JPEG sheet, in-plane reduced to a bounded size."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentcache import missing_extra
from pipeline.evaluation import CODE_KNOTS, CODE_KNOTS_HU, SPREAD_STEP_HU, CaseView, label, view_stride

try:
    from PIL import Image
except ModuleNotFoundError as error:
    raise missing_extra("pillow", "report", "the report's pictures") from error


def encode_view(view: CaseView, quality: int | None = 86) -> dict[str, Any]:
    """A case as the page's JSON: every volume one sheet; reduced in-plane when it is still too large.

    ``quality`` is JPEG's; None is lossless. ``flat`` says of the samples' spread that there is none anywhere: a sampler
    that draws no noise cannot tell how sure a model is.
    """
    shape = next(iter(view.volumes.values())).shape
    stride = view_stride(shape)
    dz, dy, dx = view.spacing_mm_zyx
    volumes = {name: volume[:, ::stride, ::stride] for name, volume in view.volumes.items()}
    depth, rows, columns = next(iter(volumes.values())).shape
    across = int(np.ceil(np.sqrt(depth)))
    return {
        "key": view.key,
        "shape": [depth, rows, columns],
        "spacing": [dz, dy * stride, dx * stride],
        "towards": view.towards,
        "across": across,
        "flat": "uncertainty" in volumes and not np.any(volumes["uncertainty"]),
        "volumes": [{"name": n, "label": label(n), "src": _sheet(n, v, across, quality)} for n, v in volumes.items()],
    }


def _sheet(name: str, volume: NDArray[Any], across: int, quality: int | None) -> str:
    depth, rows, columns = volume.shape
    down = -(-depth // across)
    sheet = np.zeros((down * rows, across * columns), np.uint8)
    for k in range(depth):
        r, c = divmod(k, across)
        piece = volume[k].astype(np.float32)
        if name == "alarm":
            codes = piece  # kept in its steps
        else:
            codes = piece / SPREAD_STEP_HU if name == "uncertainty" else np.interp(piece, CODE_KNOTS_HU, CODE_KNOTS)
        sheet[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns] = np.clip(np.rint(codes), 0, 255)
    return data_url(sheet, quality)


def data_url(grey: NDArray[np.uint8], quality: int | None = 86) -> str:
    """A grey image (y, x) as a data URL: JPEG of a quality, or PNG for None."""
    buffer = io.BytesIO()
    if quality is None:
        Image.fromarray(grey).save(buffer, "PNG")
    else:
        Image.fromarray(grey).save(buffer, "JPEG", quality=quality)
    kind = "png" if quality is None else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()
