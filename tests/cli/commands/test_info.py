"""``ctpipe info --json``: what a program needs to know, and that it is true."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import typer

from cli.main import app, command_modules
from cli.output import Exit


@pytest.fixture
def found(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert app(["info", "--json"], standalone_mode=False) == 0
    described: dict[str, Any] = json.loads(capsys.readouterr().out)
    return described


def test_every_command_is_there_with_help_and_an_example(found: dict[str, Any]) -> None:
    by_name = {command["name"]: command for command in found["commands"]}
    for module in command_modules():
        alone = typer.Typer()
        importlib.import_module(f"cli.commands.{module}").register(alone)
        added = {command.name for command in alone.registered_commands} | {g.name for g in alone.registered_groups}
        assert added, f"{module} registers no command"
        assert added <= set(by_name)
    assert [name for name, command in by_name.items() if not command["help"]] == []
    assert [name for name, command in by_name.items() if not command["examples"]] == []


def test_options_have_their_names_types_bounds_and_defaults(found: dict[str, Any]) -> None:
    (interpolate,) = [command for command in found["commands"] if command["name"] == "interpolate"]
    by_name = {name: parameter for parameter in interpolate["parameters"] for name in parameter["names"]}
    assert by_name["source"]["required"]
    assert by_name["source"]["kind"] == "argument"
    spacing = by_name["--spacing-mm"]
    assert (spacing["type"], spacing["default"], spacing["min"], spacing["max"]) == ("float", 1.0, 0.2, 10)
    assert by_name["--no-consistency"] is by_name["--consistency"]
    assert by_name["--json"]["type"] == "flag"


def test_defaults_are_those_that_the_command_line_uses(found: dict[str, Any]) -> None:
    group: Any = typer.main.get_command(app)
    for command in found["commands"]:
        if command["name"] not in group.commands:
            continue  # a command below a group
        for described, parameter in zip(command["parameters"], group.commands[command["name"]].params, strict=True):
            if isinstance(parameter.default, bool | int | float | str):
                assert described["default"] == parameter.default


def test_exit_codes_and_formats(found: dict[str, Any]) -> None:
    assert {code["code"] for code in found["exit_codes"]} == {int(code) for code in Exit} | {130}
    assert set(found["formats"]["transfer_syntaxes_written"]) == {"explicit", "jpegls", "htj2k"}
    read = {row["uid"]: row["lossy"] for row in found["formats"]["transfer_syntaxes_read"]}
    assert read["1.2.840.10008.1.2.1"] is False
    assert read["1.2.840.10008.1.2.4.50"] is True
    assert {"tiny", "medium", "classic"} == set(found["models"]["presets"])
    assert "default" in {model["name"] for model in found["models"]["interpolate"]}


def test_the_command_reference_has_every_command_and_option(found: dict[str, Any], repo_root: Path) -> None:
    """The page that the site shows is made from the same description."""
    import importlib.util

    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", repo_root / "infra" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.commands_page()
    for command in found["commands"]:
        assert f"## ctpipe {command['name']}\n" in page
        for parameter in command["parameters"]:
            assert all(f"`{name}`" in page for name in parameter["names"])
