"""Exit codes and messages of the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def ctpipe(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "cli.main", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [("ingest",), ("encode", "STORE", "--no-such-option"), ("no-such-command",)])
def test_a_usage_error_exits_2_without_a_traceback(words: tuple[str, ...]) -> None:
    done = ctpipe(*words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


def test_a_users_error_exits_1_with_its_remedy(tmp_path: Path) -> None:
    done = ctpipe("status", str(tmp_path / "none"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "there is no store" in done.stderr


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    done = ctpipe("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"ctpipe {version('ctpipe')}")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete_commands(shell: str) -> None:
    import os

    asked = {"bash": {"COMP_WORDS": "ctpipe inter", "COMP_CWORD": "1"}}.get(
        shell, {"_TYPER_COMPLETE_ARGS": "ctpipe inter"}
    )
    if shell == "fish":
        asked["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    program = "import sys; sys.argv = ['ctpipe']; from cli.main import app; app(prog_name='ctpipe')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "_CTPIPE_COMPLETE": f"complete_{shell}", **asked},
    )
    assert "interpolate" in done.stdout


def test_every_package_says_that_it_is_typed(repo_root: Path) -> None:
    for package in ("pipeline", "latentcache", "diffusion", "cli"):
        assert (repo_root / package / "py.typed").is_file()
