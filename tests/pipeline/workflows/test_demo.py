"""The demonstration: it empties its own folder and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentcache import InputError
from pipeline.workflows import claim_folder, demo_figures


def test_a_folder_of_its_own_is_emptied(tmp_path: Path) -> None:
    claim_folder(tmp_path / "demo")
    (tmp_path / "demo" / "old").touch()
    claim_folder(tmp_path / "demo")
    assert [path.name for path in (tmp_path / "demo").iterdir()] == [".ctpipe-demo"]


def test_the_files_of_others_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="empty folder"):
        claim_folder(tmp_path)
    assert (tmp_path / "mine").is_file()


def test_gains_are_differences_to_each_baseline(tmp_path: Path) -> None:
    methods = {
        name: {"psnr_db": psnr, "ssim": psnr / 100}
        for name, psnr in (("cubic", 30.0), ("cubic_consistent", 32.0), ("linear", 29.0), ("model", 33.0))
    }
    folder = tmp_path / "evaluation" / "test"
    folder.mkdir(parents=True)
    document = {"methods": methods, "cases": 2, "window_hu": [-160, 240]}
    (folder / "metrics.json").write_text(json.dumps(document))
    result = demo_figures(tmp_path, ("cubic", "model"), {"total": 1.0})
    assert result["psnr_db"] == {"cubic": 30.0, "model": 33.0}
    assert result["gain_over_cubic_db"] == 3.0
    assert result["gain_over_consistent_db"] == 1.0
    assert result["gain_over_linear_db"] == 4.0
    assert result["seconds"] == {"total": 1.0}
