"""The smallest install: every module imports without the extras, or says which extra it wants."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("pipeline", "latentcache", "diffusion", "cli")
MODULES = {
    "dask": {"dask", "distributed"},
    "ray": {"ray"},
    "report": {"matplotlib"},
    "tensorboard": {"tensorboard"},
    "s3": {"obstore"},
    "nifti": {"nibabel"},
    "pacs": {"pynetdicom"},
    "zarr": {"zarr", "numcodecs"},
    "pcodec": {"pcodec"},
    "monai": {"monai"},
}
"""What each extra brings; the test below finds an extra that is missing here."""
NEEDS = {
    "latentcache.zarr_view": "zarr",
    "latentcache.storage.s3": "s3",
    "pipeline.report.charts": "report",
}
"""Modules that are of no use without their extra, so that importing them is refused; and those that import them."""


class Absent(MetaPathFinder):
    """Importers find none of the extras' packages, whatever is installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in set().union(*MODULES.values()):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def import_everything() -> dict[str, str]:
    """Names of the modules that do not import, with their errors."""
    refused = {}
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            try:
                importlib.import_module(module.name)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is reported
                refused[module.name] = f"{type(error).__name__}: {error}"
    return refused


def test_every_module_imports_or_names_its_extra() -> None:
    code = (
        "import json, sys; from tests import test_extras as t; sys.meta_path.insert(0, t.Absent());"
        "print(json.dumps(t.import_everything()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    refused = json.loads(done.stdout.splitlines()[-1])
    unnamed = {name: text for name, text in refused.items() if not re.search(r"pip install 'ctpipe\[\w+\]'", text)}
    assert unnamed == {}
    assert {name: extra for name, extra in NEEDS.items() if f"ctpipe[{extra}]" not in refused.get(name, "")} == {}
    assert "pipeline.report.study_page" not in refused, "the page beside an interpolated study needs no extra"
    assert all(name in NEEDS or name.startswith(("pipeline.report.", "pipeline.serve.")) for name in refused), refused


def test_interpolation_and_its_help_need_no_extra() -> None:
    code = (
        "import sys; from tests import test_extras as t; sys.meta_path.insert(0, t.Absent()); import ctpipe;"
        "[getattr(ctpipe, name) for name in ctpipe.__all__];"
        "from cli.main import app; app(['interpolate', '--help'], standalone_mode=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--spacing-mm" in done.stdout


def test_the_extras_are_the_ones_that_are_tested() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = declared["optional-dependencies"]
    assert set(groups) - {"all", "demo", "bench", "dev"} == set(MODULES)
    every = re.fullmatch(r"ctpipe\[(.*)\]", groups["all"][0])
    assert every is not None
    assert set(every[1].split(",")) == set(MODULES)
    small = {re.split(r"[\[>=]", d)[0].lower() for d in declared["dependencies"]}
    assert not small & {"dask", "distributed", "matplotlib", "monai", "numcodecs", "obstore", "tensorboard", "zarr"}
