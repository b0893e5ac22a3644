"""What surrounds the wheel: its bill of materials, third-party notices, and the figures of an install."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "infra" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def bill(version: str = "0.1.0") -> dict[str, object]:
    pytest.importorskip("hatchling")
    found: dict[str, object] = load("wheel_hook").sbom(
        ROOT,
        ["pipeline", "latentcache", "diffusion", "cli"],
        name="ctpipe",
        version=version,
        required=["numpy>=1.26", "torch>=2.8"],
        optional={"dask": ["dask[array]>=2025.1", "numpy"], "all": ["ctpipe[dask]"], "dev": ["ruff>=0.9"]},
    )
    return found


def test_the_bill_lists_weights_and_declared_dependencies() -> None:
    document = bill()
    components = {c["name"]: c for c in document["components"]}  # type: ignore[attr-defined]
    assert len(components["pipeline/vae/tiny_vae.safetensors"]["hashes"][0]["content"]) == 64
    assert components["dask"]["scope"] == "optional"
    assert components["numpy"]["scope"] == "required"  # whatever extra names it again
    assert not {"ctpipe", "ruff"} & set(components)
    assert bill() == document
    assert bill("0.2.0")["serialNumber"] != document["serialNumber"]


def test_the_bill_is_valid_cyclonedx() -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    schema = pytest.importorskip("cyclonedx.schema")
    validator = validation.JsonStrictValidator(schema.SchemaVersion.V1_6)
    assert validator.validate_str(json.dumps(bill())) is None


def test_notices_name_every_package_that_is_needed() -> None:
    notices = load("notices")
    numpy = notices.closure("numpy", frozenset())
    assert numpy == []
    found = notices.closure("hypothesis", frozenset())
    assert "sortedcontainers" in {d.name for d in found}
    assert all(notices.licence(d) != notices.NO_LICENCE for d in found)
    text = notices.notices(found)
    assert text.startswith("# Third-party notices")
    assert "| sortedcontainers |" in text
    assert notices.closure("no-such-package", frozenset()) == []


def test_sizes_are_counted_by_package(tmp_path: Path) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "a").write_bytes(bytes(100))
    (tmp_path / "six.py").write_bytes(bytes(7))
    assert load("wheel_size").sizes(tmp_path) == {"torch": 100, "six.py": 7}
