"""What stands in for system calls that a platform has not."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from latentcache.storage import (
    READ_FLAGS,
    bytes_at,
    lock_alone,
    process_is_gone,
    read_at,
    sync_file,
    sync_folder,
    user_number,
)


@pytest.mark.parametrize("missing", [(), ("preadv",), ("preadv", "pread")])
def test_threads_read_one_descriptor_at_their_own_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...]
) -> None:
    for name in missing:
        monkeypatch.delattr(os, name)
    text = bytes(range(256)) * 40
    (tmp_path / "file").write_bytes(text)
    descriptor = os.open(tmp_path / "file", READ_FLAGS)

    def read(offset: int) -> bool:
        a, b = bytearray(5), bytearray(700)
        count = read_at(descriptor, [a, b], offset)
        there = text[offset : offset + 705]
        return bytes(a + b)[:count] == there and count == len(there) and bytes_at(descriptor, 9, offset) == there[:9]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(0, len(text), 97)))
    assert read_at(descriptor, [bytearray(3)], len(text)) == 0
    os.close(descriptor)


def test_syncing_without_folders_that_can_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"1")
    sync_file(tmp_path / "file")
    sync_folder(tmp_path)
    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", None)
    sync_folder(tmp_path)


def test_a_process_is_gone_when_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    real = Path.exists
    for hidden in (False, True):
        if hidden:
            monkeypatch.setattr(Path, "exists", lambda p: not str(p).startswith("/proc") and real(p))
        assert process_is_gone(ended.pid)
        assert not process_is_gone(os.getpid())


def test_a_lock_is_for_one_alone(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "wb") as first, open(tmp_path / "lock", "wb") as second:
        lock_alone(first.fileno())
        with pytest.raises(BlockingIOError):
            lock_alone(second.fileno())
        first.close()
        lock_alone(second.fileno())


def test_users_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_number() == os.getuid()
    monkeypatch.delattr(os, "getuid")
    assert user_number() is None
