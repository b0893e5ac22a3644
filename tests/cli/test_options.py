from __future__ import annotations

from typing import Any

import pytest
import typer

from cli.main import app
from cli.options import engine_options


def test_workers_that_share_a_gpu_are_named_after_it() -> None:
    devices = engine_options("ray", 8, gpu_share=0.5).devices
    assert devices == tuple(f"cuda:{i // 2}" for i in range(16)), "a machine with 8 GPUs has no cuda:15"
    assert engine_options("ray", 1, gpu_share=0.3).devices == ("cuda:0",) * 3
    assert engine_options("dask", 2).devices == ("cuda:0", "cuda:1")
    assert engine_options("dask", 0, workers=3).devices == ("cpu",) * 3


@pytest.mark.parametrize("name", ["encode", "decode", "evaluate", "interpolate", "vae-check", "train-vae"])
def test_the_arithmetic_is_chosen_wherever_a_vae_runs(name: str) -> None:
    group: Any = typer.main.get_command(app)
    (option,) = [p for p in group.commands[name].params if "--dtype" in p.opts]
    assert option.default == "auto"
