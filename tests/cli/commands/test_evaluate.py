"""``ctpipe evaluate`` as a user types it: a run, its refiner, RPLHR-CT, progress for people, and once is enough."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cli.output import Exit
from latentcache import InputError
from tests.cli.commands.test_decode import (
    ctpipe,
    result,
    site,  # noqa: F401 - a fixture
)
from tests.pipeline.evaluation.test_rplhr import made, save
from tests.support.small_site import Site


@pytest.fixture(scope="module")
def refiner(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A refiner of the run's output, not the run's own."""
    run = tmp_path_factory.mktemp("refiner") / "run"
    small = ["--patch", "8,16,16", "--batch", 2, "--width", 4, "--blocks", 1, "--steps", 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.workflows.training.refiner.WIN_DB", 1000.0)
        ctpipe("train-refiner", site.store, run, "--checkpoint", site.run, "--sampling-steps", 1, *small)
    return run


def evaluated(site: Site, run: Path, capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:  # noqa: F811
    capsys.readouterr()
    options = ["--split", "test", "--steps", 1, "--threads", 1, "--json"]
    assert ctpipe("evaluate", site.store, run, *options, *words) == Exit.OK
    return result(capsys)


def test_a_checkpoint_is_scored_once_with_progress_and_every_look_is_logged(
    site: Site,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = io.StringIO()
    with monkeypatch.context() as terminal:
        terminal.setattr("cli.output.progress_wanted", lambda: True)
        terminal.setattr("cli.output.stderr", Console(file=shown, force_terminal=True, width=100))
        first = evaluated(site, site.run, capsys)
    bars = {name: line for line in shown.getvalue().splitlines() for name in ("sampling", "scoring") if name in line}
    assert {name for name, line in bars.items() if "100%" in line} == {"sampling", "scoring"}
    assert first["failures"] == {}
    assert {"cubic", "cubic_consistent", "condition_round_trip", "model", "vae_ceiling"} <= first["methods"].keys()
    assert first["methods"]["model"]["psnr_db"] > 10
    assert first["methods"]["model"]["consistency_ratio"] < first["methods"]["cubic"]["consistency_ratio"]
    assert first["test_evaluations"] == 1
    folder = site.run / "evaluation" / "test"
    assert json.loads((folder / "metrics.json").read_text())["by_case"] == first["by_case"]
    (case,) = (folder / "cases").iterdir()
    written = case.stat().st_mtime_ns
    again = evaluated(site, site.run, capsys)
    assert case.stat().st_mtime_ns == written, "a case that is done is not done again"
    assert again["methods"] == first["methods"]
    assert again["test_evaluations"] == 2
    looks = (site.run / "test_evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["pairs"] for line in looks] == [1, 1]
    assert "scoring" not in capsys.readouterr().err, "no bars where nobody watches"


def test_a_refiner_changes_the_model_and_nothing_else(
    site: Site,  # noqa: F811
    refiner: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = evaluated(site, site.run, capsys, "--refiner", "none")
    refined = evaluated(site, site.run, capsys, "--refiner", refiner)
    assert plain["settings"]["refiner_sha256"] == ""
    (said,) = (case["consistency"] for case in refined["by_case"])
    assert said["refiner_sha256"] == refined["settings"]["refiner_sha256"] != ""
    assert said["refiner_change_hu"] > 0
    scores = [document["by_case"][0]["scores"] for document in (plain, refined)]
    assert scores[0]["model"]["psnr_db"] != scores[1]["model"]["psnr_db"]
    for method in ("cubic", "cubic_consistent", "vae_ceiling"):
        assert scores[0][method] == scores[1][method]
    with pytest.raises(InputError, match=r"no refiner\.safetensors"):
        evaluated(site, site.run, capsys, "--refiner", site.store)


def test_two_runs_are_compared_on_the_patients_that_both_scored(
    site: Site,  # noqa: F811
    refiner: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other"
    shutil.copytree(site.run, other, ignore=shutil.ignore_patterns("evaluation"))
    plain = evaluated(site, site.run, capsys, "--refiner", "none")
    refined = evaluated(site, other, capsys, "--refiner", refiner)
    assert ctpipe("compare", site.run, other, "--json") == Exit.OK
    found = result(capsys)
    assert found["common_pairs"] == 1
    row = found["model"]["psnr_db"]
    a, b = (document["methods"]["model"]["psnr_db"] for document in (plain, refined))
    assert (row["a"], row["b"]) == (pytest.approx(a), pytest.approx(b))
    assert row["difference"]["mean"] == pytest.approx(b - a)
    assert row["difference"]["low"] is None, "one patient gives no interval"
    assert found["settings_differ"]["refiner_sha256"] == ["", refined["settings"]["refiner_sha256"]]
    assert ctpipe("compare", site.run, other) == Exit.OK
    said = capsys.readouterr().out
    assert "too few patients" in said
    assert "differs: refiner_sha256" in said
    with pytest.raises(InputError, match="evaluat"):
        ctpipe("compare", site.run, refiner)


def test_rplhr_scores_the_model_with_its_refiner(
    site: Site,  # noqa: F811
    refiner: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    thick, thin = made()
    save(tmp_path / "test" / "5mm" / "CT0.nii.gz", thick)
    save(tmp_path / "test" / "1mm" / "CT0.nii.gz", thin)
    words = ["--protocol", "rplhr", "--split", "test", "--steps", 1, "--json"]
    found = {}
    for name in ("none", refiner):
        capsys.readouterr()
        assert ctpipe("evaluate", tmp_path, site.run, *words, "--refiner", name) == Exit.OK
        found[name] = result(capsys)
        assert found[name]["failures"] == {}
        assert found[name]["cases"] == 1
        assert (site.run / "evaluation" / "rplhr-test" / "metrics.json").is_file()
    plain, refined = found["none"], found[refiner]
    assert plain["settings"]["refiner_sha256"] == "" != refined["settings"]["refiner_sha256"]
    assert plain["methods"]["cubic"] == refined["methods"]["cubic"]
    assert plain["methods"]["model"]["psnr_db"] != refined["methods"]["model"]["psnr_db"]
    with pytest.raises(InputError, match="--refiner without a run"):
        ctpipe("evaluate", tmp_path, *words, "--refiner", refiner, "--out", tmp_path / "out")
    assert ctpipe("evaluate", tmp_path, *words, "--out", tmp_path / "out") == Exit.OK
    assert "model" not in result(capsys)["methods"]


def test_scores_in_another_arithmetic_are_other_scores() -> None:
    module = importlib.import_module("pipeline.workflows.evaluate")
    common: Any = ("key", SimpleNamespace(compose="c"), {"regression": "", "perceptual": ""}, "")
    named = [module._identity(*common, precision) for precision in ("auto", "fp32", "bf16")]
    assert len(set(named)) == 3
    assert named[0] == module._identity(*common), "results that are there already stay what they are"
