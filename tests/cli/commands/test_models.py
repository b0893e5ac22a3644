"""``ctpipe models``: what ships, with card and hash."""

from __future__ import annotations

import json

import pytest

from cli.main import app
from latentcache import InputError
from pipeline.refiner import shipped_models


def test_the_list_has_every_model_with_its_hash(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["models", "--json"], standalone_mode=False) == 0
    listed = json.loads(capsys.readouterr().out)["models"]
    assert [(row["name"], row["sha256"]) for row in listed] == [(m.name, m.sha256) for m in shipped_models()]
    assert listed[0]["name"] == "default"
    assert app(["models"], standalone_mode=False) == 0
    assert listed[0]["sha256"][:12] in capsys.readouterr().out


def test_a_card_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(["models", "show", "fast"], standalone_mode=False) == 0
    text = capsys.readouterr().out
    for wanted in ("name: fast", "licence", "trained for"):
        assert wanted in text
    with pytest.raises(InputError, match="no model"):
        app(["models", "show", "nothing"], standalone_mode=False)
