"""Sampling on every engine: equal latents, nothing lost with a worker, what fails set aside."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from cli.main import app
from diffusion.sampling import Interpolator, SampleSettings, generation_key
from latentcache import LatentStore
from pipeline.engines import EngineName, EngineOptions
from pipeline.workflows import Spread
from pipeline.workflows.sample import sample_store
from tests.support.small_site import SMALL, Site

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ENGINES: tuple[EngineName, ...] = ("inline", "dask", "ray")
PAIRS = 4


def ctpipe(*words: Any, code: int = 0) -> dict[str, Any]:
    """Run a command in this process and return its JSON."""
    done = CliRunner().invoke(app, [*map(str, words), "--json"], standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    assert (done.return_value or 0) == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def site(ingested_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Site:
    here = ingested_site.copy(tmp_path_factory.mktemp("sampling"))
    ctpipe("encode", here.store, "--engine", "inline", "--threads", 1, "--roles", "thin,thick_on_thin")
    # The U-Net's last layer begins at zero: two steps, so that what a sampler asks the network for is not nothing.
    ctpipe("train", here.store, here.run, "--preset", "tiny", "--max-steps", 2, *SMALL)
    return here


def rows(store: LatentStore) -> dict[str, dict[str, Any]]:
    """A generated store's rows by pair, checksums of the bytes among them, without the attempt's own path."""
    found = {record.key: asdict(record) for record in store.records(role="thin")}
    for row in found.values():
        del row["path"]
    return found


def sampled(site: Site, store: Path, engine: EngineOptions, **settings: Any) -> tuple[LatentStore, dict[str, str]]:
    latents = LatentStore.open(store)
    keys = [pair.pair_key for pair in latents.pairs()]
    drawn = SampleSettings(num_inference_steps=3, **settings)
    return sample_store(latents, site.run, Interpolator.load(site.run, "meta"), keys, drawn, Spread(engine, 1))


def test_engines_give_equal_latents(site: Site, ray_session: None, tmp_path: Path) -> None:
    found = {}
    for name in ENGINES:
        shutil.copytree(site.store, tmp_path / name)
        options = EngineOptions(name, devices=("cpu",) * (1 if name == "inline" else 2))
        out, failed = sampled(site, tmp_path / name, options, samples=2)
        assert failed == {}
        found[name] = rows(out)
        (timing, *_) = out.table("timings").to_pylist()
        assert (timing["stage"], timing["outcome"]) == ("sample", "ok")
        assert {"prepare", "run", "sample", "latents"} <= dict(timing["values"]).keys()
    assert len(found["inline"]) == PAIRS
    assert found["dask"] == found["inline"]
    assert found["ray"] == found["inline"]
    # What is compared depends on the model and on the noise.
    other, _ = sampled(site, tmp_path / "inline", EngineOptions("inline"), samples=2, seed=1)
    assert not {row["sha256"] for row in rows(other).values()} & {row["sha256"] for row in found["inline"].values()}


def test_workers_killed_in_the_midst_lose_nothing(
    site: Site, ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("whole", "killed"):
        shutil.copytree(site.store, tmp_path / name)
    undisturbed, _ = sampled(site, tmp_path / "whole", EngineOptions("inline"))
    killed: list[int] = []
    latents = LatentStore.open(tmp_path / "killed")

    def kill_once(done: int) -> None:
        if done and not killed:
            actors = [p for p in psutil.Process().children(recursive=True) if "ray::Host" in " ".join(p.cmdline())]
            killed.extend(actor.pid for actor in actors)
            for actor in actors:
                actor.kill()

    out, failed = sample_store(
        latents,
        site.run,
        Interpolator.load(site.run, "meta"),
        [pair.pair_key for pair in latents.pairs()],
        SampleSettings(num_inference_steps=3),
        Spread(EngineOptions("ray", devices=("cpu", "cpu")), 1),
        kill_once,
    )
    assert len(killed) == 2
    assert failed == {}
    assert rows(out) == rows(undisturbed)


def test_a_pair_that_fails_is_set_aside_by_both_commands(site: Site, tmp_path: Path) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    shutil.copytree(site.store, store)
    shutil.copytree(site.run, run)
    opened = LatentStore.open(store)
    split = max(("train", "val", "test"), key=lambda name: sum(p.split == name for p in opened.pairs()))
    pairs = sorted(p.pair_key for p in opened.pairs() if p.split == split)
    broken = opened.find(pairs[0], "thick_on_thin")
    assert broken is not None
    assert len(pairs) > 1
    shutil.rmtree(store / broken.path)
    words = ("--split", split, "--steps", 1, "--threads", 1)
    done = ctpipe("decode", store, tmp_path / "out", "--checkpoint", run, *words, code=3)
    assert list(done["failed"]) == pairs[:1]
    assert sorted(done["written"]) == pairs[1:]
    scored = ctpipe("evaluate", store, run, *words, code=3)
    assert pairs[0] in json.dumps(scored["failures"])
    assert scored["cases"] == len(pairs)


@pytest.mark.slow
def test_evaluate_over_a_dask_scheduler_gives_the_same_cases(site: Site, tmp_path: Path) -> None:
    """As a user would: a scheduler's address on the command line; its workers are other processes."""
    from distributed import LocalCluster

    cases = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None, silence_logs=50) as cluster:
            address = ("--engine", "dask", "--dask-scheduler", cluster.scheduler_address)
            for name, engine in (("inline", ()), ("cluster", address)):
                store, run = tmp_path / name / "store", tmp_path / name / "run"
                shutil.copytree(site.store, store)
                shutil.copytree(site.run, run)
                words = ("--split", "train", "--steps", 2, "--samples", 3, "--threads", 1)
                done = ctpipe("evaluate", store, run, *words, *engine)
                assert done["failures"] == {}
                folder = run / "evaluation" / "train" / "cases"
                cases[name] = {path.name: path.read_bytes() for path in folder.iterdir()}
                views = list((run / "evaluation" / "train" / "views").iterdir())
                assert len(views) == min(3, len(cases[name]))
                with np.load(views[0]) as view:
                    for name_of_view in ("uncertainty", "sample", "alarm"):
                        assert view[name_of_view].shape == view["model"].shape
    assert len(cases["inline"]) >= 2
    assert cases["cluster"] == cases["inline"]


def test_the_driver_needs_no_weights_to_know_the_key(site: Site) -> None:
    described, whole = Interpolator.load(site.run, "meta"), Interpolator.load(site.run)
    assert {p.device.type for p in described.model.parameters()} == {"meta"}
    settings = SampleSettings()
    assert generation_key(described, settings) == generation_key(whole, settings)
    assert (described.encode_key, described.alignment) == (whole.encode_key, whole.alignment)
