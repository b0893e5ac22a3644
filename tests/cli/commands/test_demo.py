"""The demonstration from its first command to its last, on patients as small as the commands take."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.commands.demo import REFINER
from cli.main import app
from cli.output import Exit
from diffusion.runs import RunCard
from pipeline.refiner import load_pretrained


def test_every_step_runs_and_leaves_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    words = ["demo", str(out), "--patients", "4", "--size", "32", "--slices", "36", "--train-seconds", "1", "--json"]
    assert (app(words, standalone_mode=False) or 0) == Exit.OK
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result["psnr_db"].keys() == result["ssim"].keys() >= {"cubic_consistent", "refined", "model", "vae_ceiling"}
    gain = result["psnr_db"]["model"] - result["psnr_db"]["cubic_consistent"]
    assert result["gain_over_consistent_db"] == pytest.approx(gain)
    assert json.loads((out / "metrics.json").read_text())["psnr_db"] == result["psnr_db"]
    assert RunCard.read(out / "run").refiner_sha256 == load_pretrained(REFINER).sha256
    assert (out / "report.html").is_file()
    assert list((out / "at-once").glob("*.html"))
    assert list((out / "dicom").rglob("*.dcm"))
    names = {path.name for path in (out / "archive").rglob("*.zip")}
    assert len(names) == 4


def test_its_patients_are_none_that_the_shipped_model_learnt_from() -> None:
    """The model's phantoms are `make_patient(0)` and on; those of the demo begin at 1000 times its seed."""
    card = load_pretrained(REFINER).card
    assert 0 < int(card.recipe["phantoms"]) < 1000
