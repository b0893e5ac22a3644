"""Several processes on one machine that train together over gloo, as torchrun would start them on GPUs."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Sequence

from tests.support.prepared import Script


def free_port() -> int:
    """A port that nobody listens on, below the range that outgoing connections are given theirs from."""
    while True:
        port = random.randint(10000, 32000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def on_ranks(script: str, arguments: Sequence[str] = (), *, ranks: int = 2, timeout: float = 300) -> list[str]:
    """Run a script in ``ranks`` processes of one gloo group; what each printed, or the first failure's traceback."""
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        Script(
            script,
            arguments,
            {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
        for rank in range(ranks)
    ]
    outputs = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            assert process.returncode == 0, err
            outputs.append(out)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return outputs
