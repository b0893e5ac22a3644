"""An encoding's settings as the command line spells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentcache import InputError
from pipeline.engines import EngineOptions
from pipeline.refiner import RefinerFile
from pipeline.workflows import EncodeJob


def test_spelled_settings_are_parsed() -> None:
    settings = EncodeJob("STORE", EngineOptions("inline"), window="40:400", roles="thin", pad_in_plane=64).settings()
    assert (settings.window.center, settings.window.width) == (40, 400)
    assert settings.roles == ("thin",)
    assert settings.pad_in_plane == 64
    assert settings.refiner is None


def test_a_refiner_adds_its_role_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RefinerFile, "of", lambda path: path)
    for roles in ("thin", "thin,refined_on_thin"):
        job = EncodeJob("STORE", EngineOptions("inline"), roles=roles, refiner=Path("/run"))
        assert job.settings().roles == ("thin", "refined_on_thin")


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(InputError):
        EncodeJob("STORE", EngineOptions("inline"), roles="thinner").settings()
