"""Processes of their own that need not start Python and import torch: forked from one that has done so once.

What is killed, or is a rank of a group, must be a process; the seconds of its imports are in no test's interest. They
are spent once for every worker of pytest. `test_two_processes_give_the_losses_of_one` keeps processes that begin from
nothing and end as Python ends.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import TimeoutExpired

PRELOADED = [
    "torch.distributed.fsdp", "cli.main", "diffusion.config", "diffusion.networks.unet", "diffusion.runs.checkpoint",
    "diffusion.training.train", "diffusion.training.validation", "latentcache.maintenance", "pipeline.encode.store",
    "pipeline.vae", "pipeline.workflows.encoding", "safetensors.torch", "scipy.ndimage",
]  # fmt: skip
"""None of them starts a thread (but for Arrow's allocator, which starts its own anew): a forked process would have the
locks that the thread held, and no thread to let go of them."""


class Script:
    """A running script, used as `subprocess.Popen` is."""

    def __init__(
        self, code: str, arguments: Sequence[str | Path] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = Path(tempfile.mkdtemp())
        self._said: tuple[str, str] | None = None
        words = [*map(str, arguments)]
        environment = {**os.environ, **(environment or {})}
        self._process: ForkServerProcess = context.Process(
            target=_run, args=(code, words, environment, os.getcwd(), self._folder)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Raises TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutExpired("script", timeout or 0.0)
        if self._said is None:
            out, err = (path.read_text() if path.exists() else "" for path in _streams(self._folder))
            self._said = out, err
            shutil.rmtree(self._folder)
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it has printed, once it has ended. Raises TimeoutExpired."""
        self.wait(timeout)
        assert self._said is not None
        return self._said


def _streams(folder: Path) -> tuple[Path, Path]:
    return folder / "out", folder / "err"


def _run(code: str, arguments: list[str], environment: dict[str, str], folder: str, said: Path) -> None:
    for number, path in enumerate(_streams(said), start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
    finally:
        sys.stdout.flush()
