"""Triton without a GPU: the interpreter, which runs kernels on the CPU, and the compiler, which needs no device.

Import this before any module with kernels: whether they are interpreted is decided where they are defined.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton", reason="Triton is not installed: its kernels are not tested here")
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU here: kernels run in Triton's interpreter, not compiled")
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
"""Where the kernels of a test run: interpreted on a CPU, compiled on a GPU."""


def kernels(module: str) -> Any:
    """The module, imported after it has been decided where its kernels run."""
    return importlib.import_module(module)


_COMPILE = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
module, wanted = json.loads(sys.argv[1])
module = importlib.import_module(module)
for name, types, constants in wanted:
    kernel = getattr(module, name)
    names = kernel.arg_names
    signature = dict(zip(names, types)) | {n: "constexpr" for n in names[len(types):]}
    for target in (80, 90):
        source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()})
        done = triton.compile(source, target=GPUTarget("cuda", target, 32))
        assert len(done.asm["cubin"]) > 1000
        print(name, target, done.metadata.shared)
"""


def compile_for_gpus(module: str, wanted: list[tuple[str, list[str], dict[str, object]]], cache: Path) -> list[str]:
    """Compile kernels for an A100 and an H100, in a process that does not interpret: name, types of the arguments that
    are passed at run time, and the constants of each. Returns a line for each kernel and target."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE, json.dumps([module, wanted])],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
