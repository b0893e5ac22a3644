"""Choice between two functions of the VAE's weights: the exact one, or blended windows as others do it.

Exact is the default and leaves no trace in the encode key. Windows change every latent, so they are part of it
(`Encoding.extra`), and what was encoded in windows is decoded in the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentcache import InputError, missing_extra


def blend(window: int, border: int) -> Tensor:
    """A trapezoid of length ``window`` that rises over ``border`` samples at both ends and is never zero."""
    i = torch.arange(window, dtype=torch.float32)
    return torch.minimum(i + 1, window - i).clamp_max(border + 1) / (border + 1)


def sliding(
    run: Callable[[Tensor], Tensor], x_CDHW: Tensor, window_zyx: tuple[int, int, int], overlap: float, scale: float
) -> Tensor:
    """Apply ``run``, a map of (1, C, d, h, w) to a grid ``scale`` times as fine, window by window, and blend.

    MONAI's `SlidingWindowInferer` walks over the grid of the result, so that the weights are those of its samples and
    not of a coarser grid repeated; each window's input is looked up by its coordinates.

    Args:
        window_zyx: Window in input samples; window times scale must be whole.
        overlap: Share of the window that neighbours share, 0 to below 1.

    Raises:
        InputError: An overlap outside [0, 1), or MONAI is not installed.
    """
    if not 0 <= overlap < 1:
        raise InputError(f"overlap {overlap}", expected="0 to below 1", remedy="0.4 is usual.")
    try:
        from monai.inferers import SlidingWindowInferer
    except ModuleNotFoundError as error:
        raise missing_extra("monai", "monai", "--tiling sliding and latents encoded with it") from error

    size = tuple(x_CDHW.shape[1:])
    x = reflect_to(x_CDHW, window_zyx)
    windows = tuple(round(n * scale) for n in window_zyx)
    grid = torch.zeros(1).expand(1, 1, *(round(n * scale) for n in x.shape[1:]))  # coordinates only: takes no memory

    def at(_: Tensor, corners: list[list[slice]]) -> Tensor:
        starts = [round(c.start / scale) for c in corners[0][2:]]
        part = x[(slice(None), *(slice(o, o + n) for o, n in zip(starts, window_zyx, strict=True)))]
        # MONAI weighs what it is given in place, and an inferred window may be a view of the input.
        return run(part.unsqueeze(0)).clone()

    inferer = SlidingWindowInferer(windows, 1, overlap=_overlaps(window_zyx, overlap, scale), with_coord=True)
    inferer.roi_weight_map = _weights(windows, overlap)
    total: Tensor = inferer(grid, at)[0]
    return total[:, : round(size[0] * scale), : round(size[1] * scale), : round(size[2] * scale)]


def reflect_to(x_CDHW: Tensor, least_zyx: tuple[int, int, int]) -> Tensor:
    """Extend at the far ends by reflection until no length is below ``least_zyx``."""
    x = x_CDHW
    for axis, least in enumerate(least_zyx, start=1):
        while x.shape[axis] < least:
            extra = min(least - x.shape[axis], max(1, x.shape[axis] - 1))
            mirror = x.flip(axis).narrow(axis, 1 if x.shape[axis] > 1 else 0, extra)
            x = torch.cat([x, mirror], dim=axis)
    return x


def _overlaps(window_zyx: tuple[int, int, int], overlap: float, scale: float) -> tuple[float, ...]:
    """Overlaps from which MONAI's ``int(window * (1 - overlap))`` gives steps on whole samples of both grids."""
    coarse = round(1 / scale) if scale < 1 else 1
    shares = []
    for n in window_zyx:
        step = round(max(coarse, int(n * (1 - overlap)) // coarse * coarse) * scale)
        shares.append(max(0.0, 1 - (step + 0.5) / round(n * scale)))
    return tuple(shares)


def _weights(windows: tuple[int, ...], overlap: float) -> Tensor:
    """Trapezoids of the three axes multiplied, the smallest 1: MONAI would raise any below 0.001."""
    z, y, x = (blend(n, round(n * overlap)) for n in windows)
    weights = z[:, None, None] * y[:, None] * x
    return weights / weights.min()


@dataclass(frozen=True)
class Tiling:
    """Windows of ``window_zyx`` voxels, of which neighbours share ``overlap`` (0 to below 1)."""

    window_zyx: tuple[int, int, int] = (64, 64, 64)
    overlap: float = 0.4

    def to_extra(self) -> dict[str, Any]:
        """As it is in `Encoding.extra`."""
        return {"tiling": {"kind": "sliding", "window_zyx": list(self.window_zyx), "overlap": self.overlap}}


def parse_tiling(text: str) -> Tiling | None:
    """``exact`` (None) or ``sliding``."""
    if text not in ("exact", "sliding"):
        raise InputError(f"--tiling {text}", expected="exact or sliding", remedy="Leave it out: exact is the default.")
    return Tiling() if text == "sliding" else None


def tiling_of(extra: Mapping[str, Any]) -> Tiling | None:
    """Return the tiling that `Tiling.to_extra` wrote; None for an exact encoding.

    Raises:
        InputError: A tiling of a kind that this version does not know.
    """
    written = extra.get("tiling")
    if written is None:
        return None
    if written.get("kind") != "sliding":
        raise InputError(
            f"latents encoded with tiling {written.get('kind')!r}",
            expected="exact or sliding",
            remedy="They come from a newer ctpipe: upgrade, or encode again.",
        )
    z, y, x = written["window_zyx"]
    return Tiling((z, y, x), written["overlap"])
