"""Windows cover the volume, stay inside it, and blend to the identity when the map is the identity."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from latentcache import InputError
from pipeline.vae.sliding_window import reflect_to, sliding, window_starts


@given(length=st.integers(1, 200), window=st.integers(1, 64), step=st.integers(1, 64))
def test_windows_cover_and_stay_inside(length: int, window: int, step: int) -> None:
    starts = window_starts(length, window, min(step, window))
    covered = {i for s in starts for i in range(s, s + window)}
    assert covered >= set(range(length))
    assert starts[-1] + window == max(length, window)


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
