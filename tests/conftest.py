"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support.small_site import ingested_site, phantoms, trained_site  # noqa: F401 - fixtures

ROOT = Path(__file__).resolve().parent.parent

# Triton decides whether it interprets where its own library is imported, which any test module may do: before all.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What a test finds must not depend on how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of genuine CT: CTPIPE_REAL_DATA, else ../shared/data/real beside the project; skips without one."""
    folder = Path(os.environ.get("CTPIPE_REAL_DATA") or ROOT.parent / "shared" / "data" / "real")
    if not folder.is_dir():
        pytest.skip("no genuine CT here: set CTPIPE_REAL_DATA")
    return folder


@pytest.fixture(autouse=True)
def gpu_for_those_marked(request: pytest.FixtureRequest) -> None:
    """Tests marked ``cuda`` say why they do not run where torch sees no GPU."""
    if request.node.get_closest_marker("cuda") is None:
        return
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} sees no GPU" if built else f"torch {torch.__version__} is built without CUDA"
        pytest.skip(f"{why}: run `make test-gpu` on a machine with one")


@pytest.fixture(scope="session")
def threads_at_first() -> int | None:
    """Threads that torch computes with before any test has asked for others; None where nothing has loaded it."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


@pytest.fixture(autouse=True)
def threads_as_they_were(threads_at_first: int | None) -> Iterator[None]:
    """Commands pin their threads for good, as is right in a process of their own: here the next test computes with them
    too, and two threads that wait for each other on a busy machine do so by spinning."""
    yield
    workers = sys.modules.get("pipeline.engines.workers")
    if threads_at_first is None or workers is None:
        return
    if sys.modules["torch"].get_num_threads() != threads_at_first or workers._blas not in (None, threads_at_first):
        workers.pin(threads_at_first)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope="module")
def ray_session() -> None:
    """A Ray session of two workers. Tests that ask for it share one, see `pytest_runtest_setup`."""
    pytest.importorskip("ray")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first, so that short ones fill up the workers' ends; those on Ray next to each other, and those that
    fork from one prepared process, which each worker that runs such a test prepares anew."""
    long = {ROOT / "tests" / "end_to_end", ROOT / "tests" / "docs"}

    def place(item: pytest.Item) -> int:
        if "ray_session" in _fixtures(item):
            return 0
        if {"Script", "on_ranks"} & vars(getattr(item, "module", None) or object).keys():
            return 1
        return 2 if item.path.parent in long else 3

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Ray takes ten seconds of a core to start: it is started before the first test that needs it, and ended before the
    first that does not."""
    if "ray_session" not in _fixtures(item):
        _end_ray()
    elif importlib.util.find_spec("ray") is not None:
        from pipeline.engines import EngineOptions
        from pipeline.engines.ray_cluster import connect

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        connect(EngineOptions(name="ray", devices=("cpu", "cpu")))


def pytest_sessionfinish() -> None:
    _end_ray()


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])


def _end_ray() -> None:
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    with warnings.catch_warnings():
        # Ray leaves the handles of its processes to the collector, which complains of them.
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()
