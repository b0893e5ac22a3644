from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.decode import VaeSettings

store = importlib.import_module("pipeline.decode.store")


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
    monkeypatch.setattr(store, "load_decoder", lambda device, **options: seen.update(options, device=device))
    encoding = SimpleNamespace(compute_dtype=latents[0], device_kind=latents[1], vae_sha256="abc", extra={"a": 1})
    latent_store = cast(Any, SimpleNamespace(encoding=lambda key: encoding))
    VaeSettings("tiny", 2.0, precision=precision).loader(latent_store, "key", 0.5)("cpu")
    assert seen == {
        "device": "cpu", "spec": "tiny", "memory_gib": 2.0, "gpu_share": 0.5, "expected_sha256": "abc",
        "extra": {"a": 1}, "dtype": expected,
    }  # fmt: skip
