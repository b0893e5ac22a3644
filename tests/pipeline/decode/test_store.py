from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.decode import VaeSettings

vae = importlib.import_module("pipeline.vae.vae")


@pytest.mark.parametrize(
    ("latents", "precision", "expected"),
    [
        (("float32", "cpu"), "auto", "float32"),
        (("bfloat16", "cpu"), "auto", "bfloat16"),
        (("bfloat16", "cuda"), "auto", "float32"),
        (("bfloat16", "cpu"), "fp32", "float32"),
        (("float32", "cpu"), "bf16", "bfloat16"),
    ],
)
def test_workers_decode_as_the_latents_were_encoded_unless_asked(
    latents: tuple[str, str], precision: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(vae, "load_vae", lambda spec, **options: seen.update(options, spec=spec))
    encoding: Any = SimpleNamespace(compute_dtype=latents[0], device_kind=latents[1], extra={})
    VaeSettings("tiny", 2.0, precision=precision).loader(encoding, 0.5)("cpu")
    assert seen == {
        "device": "cpu", "spec": "tiny", "memory_gib": 2.0, "dtype": getattr(torch, expected), "expected": encoding,
    }  # fmt: skip
