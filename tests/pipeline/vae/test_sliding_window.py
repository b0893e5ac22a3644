"""Windows cover the volume, stay inside it, and blend to the identity when the map is the identity."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from latentcache import InputError
from pipeline.vae.sliding_window import blend, reflect_to, sliding


def reference(run: Any, x: torch.Tensor, window: tuple[int, int, int], overlap: float, scale: float) -> torch.Tensor:
    """Blended windows written out, as latents of earlier versions were made; what MONAI's inferer must reproduce."""
    coarse = round(1 / scale) if scale < 1 else 1
    starts = []
    for length, w in zip(x.shape[1:], window, strict=True):
        step = max(coarse, int(w * (1 - overlap)) // coarse * coarse)
        starts.append([*range(0, max(length - w, 0), step), max(length - w, 0)])
    z, y, x_ = (blend(round(n * scale), round(n * scale * overlap)) for n in window)
    mask = z[:, None, None] * y[:, None] * x_
    size = [round(n * scale) for n in x.shape[1:]]
    total, weight = torch.zeros(1, *size), torch.zeros(size)
    for corner in product(*starts):
        part = run(x[(slice(None), *(slice(o, o + n) for o, n in zip(corner, window, strict=True)))][None])[0]
        place = tuple(slice(round(o * scale), round((o + n) * scale)) for o, n in zip(corner, window, strict=True))
        total[(slice(None), *place)] += part * mask
        weight[place] += mask
    return total / weight


@settings(max_examples=20, deadline=None)
@given(
    shape=st.tuples(*[st.integers(4, 12)] * 3),
    window=st.sampled_from([(16, 16, 16), (4, 8, 16)]),
    overlap=st.sampled_from([0.0, 0.3, 0.4, 0.75]),
    down=st.booleans(),
)
def test_monai_walks_and_blends_as_before(
    shape: tuple[int, int, int], window: tuple[int, int, int], overlap: float, down: bool
) -> None:
    """By a map that depends on where a window begins, so that another walk or weight would show."""

    def run(part: torch.Tensor) -> torch.Tensor:
        out = F.avg_pool3d(part, 4) if down else F.interpolate(part, scale_factor=4.0)
        return out * (1 + part[:, :, :1, :1, :1])

    window = window if down else (window[0] // 4, window[1] // 4, window[2] // 4)
    size = tuple(4 * n for n in shape) if down else shape
    x = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    scale = 0.25 if down else 4
    torch.testing.assert_close(
        sliding(run, x, window, overlap, scale), reference(run, x, window, overlap, scale), rtol=1e-5, atol=1e-6
    )


def test_without_monai_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.inferers", None)
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(InputError, match=r"ctpipe\[monai\]"):
        sliding(lambda part: part, torch.zeros(1, 4, 4, 4), (4, 4, 4), 0.5, 1)


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 20)] * 3), overlap=st.sampled_from([0.0, 0.4, 0.75]))
def test_pooling_in_windows_is_pooling(shape: tuple[int, int, int], overlap: float) -> None:
    size = tuple(4 * n for n in shape)
    x = torch.rand(1, *size, generator=torch.Generator().manual_seed(0))
    out = sliding(lambda part: F.avg_pool3d(part, 4), x, (16, 16, 16), overlap, 0.25)
    torch.testing.assert_close(out, F.avg_pool3d(x, 4))
    back = sliding(lambda part: F.interpolate(part, scale_factor=4.0), out, (4, 4, 4), overlap, 4)
    torch.testing.assert_close(back, F.interpolate(out[None], scale_factor=4.0)[0])


def test_small_volumes_are_reflected_not_padded_with_air() -> None:
    x = torch.arange(1.0, 4.0).view(1, 3, 1, 1)
    assert reflect_to(x, (8, 1, 1)).flatten().tolist() == [1, 2, 3, 2, 1, 2, 3, 2]


def test_an_overlap_of_one_never_ends() -> None:
    with pytest.raises(InputError, match="overlap"):
        sliding(lambda part: part, torch.zeros(1, 4, 4, 4), (4, 4, 4), 1.0, 1)
