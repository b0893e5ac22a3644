from __future__ import annotations

import pytest
import torch

from latentcache import held_by_others


@pytest.mark.parametrize(("free", "own", "text"), [(10, 20, "about 50.0 of its 80.0 GiB"), (60, 20, None)])
def test_another_process_on_the_gpu_is_named(
    free: int, own: int, text: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: own << 30)
    found = held_by_others(torch.device("cuda", 0))
    assert text in found if text else found == ""
    assert held_by_others(torch.device("cpu")) == ""
