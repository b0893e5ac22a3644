"""One rule for devices: `auto` is a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from latentcache import InputError
from pipeline.engines import resolve_device, resolve_gpus


@pytest.mark.parametrize(("there", "wanted", "gpus"), [(True, "cuda", 2), (False, "cpu", 0)])
def test_auto(monkeypatch: pytest.MonkeyPatch, there: bool, wanted: str, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 * there)
    assert resolve_device() == wanted
    assert resolve_gpus(None) == gpus
    assert resolve_gpus(0) == 0


def test_what_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == "cuda:1"
    for wrong in ("cuda:2", "gpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(InputError, match="device"):
            resolve_device(wrong)
