from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from latentcache import free_host_bytes, peak_bytes


def group(root: Path, limit: str, current: int, droppable: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "memory.max").write_text(f"{limit}\n")
    (root / "memory.current").write_text(f"{current}\n")
    (root / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")
    return root


def test_a_containers_limit_counts_and_file_pages_are_free(tmp_path: Path) -> None:
    assert free_host_bytes(group(tmp_path, str(3 << 30), 2 << 30, 1 << 30)) == 2 << 30
    assert free_host_bytes(group(tmp_path, str(1 << 30), 2 << 30, 0)) == 0


def test_the_older_form_of_control_groups_counts_too(tmp_path: Path) -> None:
    old = tmp_path / "memory"
    old.mkdir()
    (old / "memory.limit_in_bytes").write_text(str(1 << 30))
    (old / "memory.usage_in_bytes").write_text(str(1 << 29))
    assert free_host_bytes(tmp_path) == 1 << 29


def test_without_a_limit_the_machine_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=12345))
    assert free_host_bytes(tmp_path) == 12345
    assert free_host_bytes(group(tmp_path, "max", 1, 0)) == 12345


def test_the_peak_is_in_bytes_whoever_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    held = psutil.Process().memory_info().rss
    assert held / 2 < peak_bytes() < 200 * held
    monkeypatch.setitem(sys.modules, "resource", None)
    assert held / 2 < peak_bytes() < 200 * held
