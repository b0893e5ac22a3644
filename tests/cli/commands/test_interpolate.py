"""``ctpipe interpolate``: no option is needed; devices are found by one rule in every command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
import typer.main

from cli.main import UsageError, app
from tests.pipeline.writing.test_ct_image import validator_errors
from tests.support.dicom_files import anatomy, enhanced, zip_of
from tests.support.nifti_files import nifti


def test_one_line_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["interpolate", str(nifti(tmp_path / "a.nii.gz")), str(tmp_path / "out")], standalone_mode=False) == 0
    text = capsys.readouterr().out
    for wanted in (
        "8 slices -> 40 at 1 mm",
        "model default",
        "slice profile assumed: box 5 mm",
        "RMS against",
        "open ",
    ):
        assert wanted in text
    assert "warning: NIfTI states no slice thickness" in text


def test_json_holds_figures_and_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["interpolate", str(nifti(tmp_path / "a.nii")), str(tmp_path / "out"), "--no-page", "--json"]
    assert app(words, standalone_mode=False) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == "default"
    assert result["page"] is None
    assert len(result["warnings"]) == 1
    assert set(result["stage_seconds"]) == {"refine", "agree", "write"}


def test_one_enhanced_instance_in_and_one_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = pydicom.dcmread(io.BytesIO(enhanced(anatomy(), list(5.0 * np.arange(8)))))
    made.Manufacturer, made.ManufacturerModelName, made.BodyPartExamined = "SIEMENS", "SOMATOM Force", "CHEST"
    buffer = io.BytesIO()
    made.save_as(buffer)
    source = zip_of(tmp_path / "enhanced.zip", [buffer.getvalue()])
    words = ["interpolate", str(source), str(tmp_path / "out"), "--enhanced", "--no-page", "--json"]
    assert app(words, standalone_mode=False) == 0
    (file,) = (tmp_path / "out").glob("*/*.dcm")
    ds = pydicom.dcmread(file)
    assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.2.1"
    assert ds.NumberOfFrames == json.loads(capsys.readouterr().out)["slices"] > 30
    assert validator_errors(file) == []


@pytest.mark.parametrize("extra", [["--model", "fast", "--checkpoint", "."], ["--checkpoint", "nowhere"]])
def test_contradictions_are_usage_errors(tmp_path: Path, extra: list[str]) -> None:
    with pytest.raises(UsageError):
        app(["interpolate", "a.zip", str(tmp_path), *extra], standalone_mode=False)


def commands() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return dict(group.commands)


def test_every_command_finds_its_device_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    seen = set()
    for name, command in commands().items():
        for option in command.params:
            if option.name == "device":
                seen.add(name)
                context = command.make_context(name, [], resilient_parsing=True)
                assert option.default == "auto", name
                assert option.callback(context, option, "auto") == "auto"  # nothing is looked for in completion
                context.resilient_parsing = False
                assert option.callback(context, option, "auto") == "cuda", name
            if option.name == "gpus" and name != "plan":
                assert option.default is None, name
    assert seen >= {"interpolate", "evaluate", "train-refiner", "train-regression", "train-vae", "vae-check", "verify"}
